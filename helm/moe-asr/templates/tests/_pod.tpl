{{/* A pod of `helm test`, placed as the workflow's pods without a GPU. Takes (dict "root" ROOT "name" NAME "account" ACCOUNT "token" BOOL "command" LIST)
     and if need be "env", "envFrom" (lists) and "configMap" (a name, mounted at /config). */}}
{{- define "moe-asr.testPod" -}}
apiVersion: v1
kind: Pod
metadata:
  name: {{ include "moe-asr.fullname" .root }}-test-{{ .name }}
  labels: {{- include "moe-asr.labels" .root | nindent 4 }}
  annotations: {{- include "moe-asr.testHook" "0" | nindent 4 }}
spec:
  restartPolicy: Never
  serviceAccountName: {{ .account }}
  automountServiceAccountToken: {{ .token }}
  activeDeadlineSeconds: {{ .root.Values.tests.deadlineSeconds }}
  {{- with .root.Values.images.pullSecrets }}
  imagePullSecrets: {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with .root.Values.workflow.nodeSelector }}
  nodeSelector: {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with .root.Values.workflow.tolerations }}
  tolerations: {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with .root.Values.workflow.schedulerName }}
  schedulerName: {{ . }}
  {{- end }}
  {{- with .root.Values.workflow.priorityClassName }}
  priorityClassName: {{ . }}
  {{- end }}
  securityContext: {{- include "moe-asr.podSecurityContext" .root | nindent 4 }}
  containers:
    - name: test
      image: {{ include "moe-asr.image" (list .root "cluster") }}
      imagePullPolicy: {{ .root.Values.images.pullPolicy }}
      command: {{- toYaml .command | nindent 8 }}
      env: {{- concat (list (dict "name" "HOME" "value" "/scratch") (dict "name" "TMPDIR" "value" "/scratch")) (default list .env) | toYaml | nindent 8 }}
      {{- with .envFrom }}
      envFrom: {{- toYaml . | nindent 8 }}
      {{- end }}
      resources: {{- toYaml .root.Values.tests.resources | nindent 8 }}
      securityContext:
        allowPrivilegeEscalation: false
        readOnlyRootFilesystem: true
        runAsNonRoot: true
        capabilities: {drop: [ALL]}
      volumeMounts:
        - {name: scratch, mountPath: /scratch}
        {{- with .configMap }}
        - {name: config, mountPath: /config, readOnly: true}
        {{- end }}
        {{- with .root.Values.workflow.extraVolumeMounts }}
        {{- toYaml . | nindent 8 }}
        {{- end }}
  volumes:
    - name: scratch
      emptyDir: {sizeLimit: 1Gi}
    {{- with .configMap }}
    - name: config
      configMap: {name: {{ . }}}
    {{- end }}
    {{- with .root.Values.workflow.extraVolumes }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
{{- end -}}

{{/* Annotations of what exists while `helm test` runs; logs are printed, since pods are not kept. Takes a weight. */}}
{{- define "moe-asr.testHook" -}}
helm.sh/hook: test
helm.sh/hook-weight: {{ . | quote }}
helm.sh/hook-delete-policy: before-hook-creation,hook-succeeded,hook-failed
helm.sh/hook-output-log-policy: hook-succeeded,hook-failed
{{- end -}}
