{{/* Parameters of the workflow that values decide, as JSON: name → text. Numbers are printed as they were written. */}}
{{- define "moe-asr.parameters" -}}
{{- $values := .Values }}
{{- $workflow := $values.workflow }}
{{- $set := dict
  "mode" $values.mode
  "config" (ternary "" (toYaml $values.config) (empty $values.config))
  "gpu" $values.gpu.preset
  "gpus" (printf "%d" (int64 $values.gpu.count))
  "gpu-table" (include "moe-asr.productTable" .)
  "store" $values.store.url
  "endpoint-url" $values.store.endpointUrl
  "parallelism" (printf "%d" (int64 $workflow.parallelism))
  "retries" (printf "%d" (int64 $workflow.retries))
  "stage-deadline" (printf "%d" (int64 $workflow.stageDeadlineSeconds))
  "shm-size" $workflow.shmSize
  "scratch-size" $workflow.scratchSize
  "queue" $workflow.queue
  "artifacts" (toString $workflow.artifacts)
}}
{{- range $name, $kind := dict "gpuStage" "gpu-stage" "cpuStage" "cpu-stage" "step" "step" }}
  {{- $asked := get $values.resources $name }}
  {{- $_ := set $set (printf "%s-cpu" $kind) (toString $asked.cpu) }}
  {{- $_ := set $set (printf "%s-memory" $kind) (printf "%d" (int64 $asked.memoryGi)) }}
{{- end }}
{{- mergeOverwrite $set $workflow.parameters | toJson }}
{{- end -}}

{{/* Products of all presets as JSON: the workflow's own, and those of the values over them. */}}
{{- define "moe-asr.productTable" -}}
{{- $made := .Files.Get "files/moe-asr.yaml" | fromYaml }}
{{- range $made.spec.arguments.parameters }}
  {{- if eq .name "gpu-table" }}{{ mergeOverwrite (fromJson .value) $.Values.gpu.products | toJson }}{{ end }}
{{- end }}
{{- end -}}

{{/* Products of the chosen preset, as a JSON list; empty for the CPU. */}}
{{- define "moe-asr.products" -}}
{{- if eq .Values.gpu.preset "cpu" }}[]{{ else }}{{ get (include "moe-asr.productTable" . | fromJson) .Values.gpu.preset | toJson }}{{ end }}
{{- end -}}

{{/* Environment of all stages beyond what the workflow itself sets. */}}
{{- define "moe-asr.env" -}}
{{- $env := list }}
{{- with .Values.store.region }}
  {{- $env = concat $env (list (dict "name" "AWS_REGION" "value" .) (dict "name" "AWS_DEFAULT_REGION" "value" .)) }}
{{- end }}
{{- with .Values.hub.existingSecret }}
  {{- $env = append $env (dict "name" "HF_TOKEN" "valueFrom" (dict "secretKeyRef" (dict "name" . "key" "HF_TOKEN"))) }}
{{- end }}
{{- concat $env .Values.workflow.extraEnv | toYaml }}
{{- end -}}

{{/* Sources of the environment of all stages: the store's credentials first, so that extraEnvFrom wins. */}}
{{- define "moe-asr.envFrom" -}}
{{- $secrets := list }}
{{- with .Values.store.existingSecret }}
  {{- $secrets = list (dict "secretRef" (dict "name" . "optional" true)) }}
{{- end }}
{{- concat $secrets .Values.workflow.extraEnvFrom | toYaml }}
{{- end -}}

{{/* Changes a template's pod, in place: GPU resource and taints, and what the values say about its stage alone.
     Quantities are in Argo's patch of the pod. Takes (dict "root" ROOT "template" TEMPLATE); prints nothing. */}}
{{- define "moe-asr.patchPod" -}}
{{- $template := .template }}
{{- $gpu := .root.Values.gpu }}
{{- $own := dict }}
{{- if hasSuffix "-pod" $template.name }}
  {{- $own = default dict (get .root.Values.stages (trimSuffix "-pod" $template.name)) }}
{{- end }}
{{- $text := $template.podSpecPatch }}
{{- with $own.memoryGi }}
  {{- $text = regexReplaceAll "asInt\\(workflow\\.parameters\\['[a-z-]+-memory'\\]\\)" $text (printf "%d" (int64 .)) }}
{{- end }}
{{- $patch := fromJson $text }}
{{- $asked := (first $patch.containers).resources }}
{{- with $own.cpu }}{{ $_ := set $asked.requests "cpu" . }}{{ end }}
{{- with get $asked.limits "nvidia.com/gpu" }}
  {{- $_ := set (unset $asked.limits "nvidia.com/gpu") $gpu.resource . }}
{{- end }}
{{- $_ := set $template "podSpecPatch" (toRawJson $patch) }}
{{- if $template.tolerations }}{{ $_ := set $template "tolerations" (concat $gpu.tolerations .root.Values.workflow.tolerations) }}{{ end }}
{{- with $own.nodeSelector }}{{ $_ := set $template "nodeSelector" (merge (deepCopy .) $.root.Values.workflow.nodeSelector) }}{{ end }}
{{- with default .root.Values.workflow.priorityClassName $own.priorityClassName }}{{ $_ := set $template "priorityClassName" . }}{{ end }}
{{- end -}}

{{/* Security of the containers that Argo adds to each pod, as "restricted" asks for it. */}}
{{- define "moe-asr.executorPatch" -}}
{{- $context := dict "allowPrivilegeEscalation" false "runAsNonRoot" true "capabilities" (dict "drop" (list "ALL")) }}
{{- dict "initContainers" (list (dict "name" "init" "securityContext" $context)) "containers" (list (dict "name" "wait" "securityContext" $context)) | toJson }}
{{- end -}}
