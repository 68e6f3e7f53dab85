{{/* Start of all names: the release's, with the chart's where the release's does not say it. */}}
{{- define "moe-asr.fullname" -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride | trunc 40 | trimSuffix "-" -}}
{{- else -}}
{{- if contains .Chart.Name .Release.Name -}}
{{- .Release.Name | trunc 40 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name .Chart.Name | trunc 40 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{/* Names of what lies outside of the release's namespace say where the release is. */}}
{{- define "moe-asr.clusterName" -}}
{{- printf "%s-%s" .Release.Namespace (include "moe-asr.fullname" .) | trunc 55 | trimSuffix "-" -}}
{{- end -}}

{{/* Labels by which a policy or a monitor finds the release's pods. */}}
{{- define "moe-asr.selectorLabels" -}}
app.kubernetes.io/name: {{ .Chart.Name }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{- define "moe-asr.labels" -}}
{{ include "moe-asr.selectorLabels" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" }}
{{- with .Values.commonLabels }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{- define "moe-asr.templateName" -}}
{{- default (printf "%s-%s" (include "moe-asr.fullname" .) (replace "+" "-" .Chart.AppVersion)) .Values.workflow.name -}}
{{- end -}}

{{- define "moe-asr.extendName" -}}
{{- with .Values.workflow.name }}{{ . }}-extend{{ else }}{{ include "moe-asr.fullname" . }}-extend-{{ replace "+" "-" .Chart.AppVersion }}{{ end -}}
{{- end -}}

{{- define "moe-asr.stageAccount" -}}
{{- default (include "moe-asr.fullname" .) .Values.serviceAccounts.stage.name -}}
{{- end -}}

{{- define "moe-asr.executorAccount" -}}
{{- default (printf "%s-executor" (include "moe-asr.fullname" .)) .Values.serviceAccounts.executor.name -}}
{{- end -}}

{{- define "moe-asr.cacheName" -}}
{{- default (printf "%s-cache" (include "moe-asr.clusterName" .)) .Values.memoization.cacheName -}}
{{- end -}}

{{- define "moe-asr.configName" -}}
{{- printf "%s-config" (include "moe-asr.fullname" .) -}}
{{- end -}}

{{/* Whether an object of a custom kind is wanted: true, false, or auto: where the cluster knows the kind.
     Takes (list ROOT VALUE API-VERSION); says "true" or nothing. */}}
{{- define "moe-asr.wanted" -}}
{{- $root := index . 0 -}}
{{- $value := toString (index . 1) -}}
{{- if or (eq $value "true") (and (eq $value "auto") ($root.Capabilities.APIVersions.Has (index . 2))) -}}true{{- end -}}
{{- end -}}

{{/* The image of a stage, by digest where there is one. Takes (list ROOT STAGE). */}}
{{- define "moe-asr.image" -}}
{{- $images := (index . 0).Values.images -}}
{{- $name := printf "%s/%s" (trimSuffix "/" $images.registry) (index . 1) -}}
{{- with get $images.digests (index . 1) -}}
{{- printf "%s@%s" $name . -}}
{{- else -}}
{{- printf "%s:%s" $name (default (index . 0).Chart.AppVersion $images.tag) -}}
{{- end -}}
{{- end -}}

{{/* Security context of the release's own pods, as the workflow's. */}}
{{- define "moe-asr.podSecurityContext" -}}
{{- $made := .Files.Get "files/moe-asr.yaml" | fromYaml -}}
{{- mergeOverwrite $made.spec.securityContext .Values.workflow.podSecurityContext | toYaml -}}
{{- end -}}

{{/* Peers of a network policy: the addresses, or any but those of a cloud's metadata server. */}}
{{- define "moe-asr.peers" -}}
{{- if . -}}
{{- range . }}
- ipBlock: {cidr: {{ . | quote }}}
{{- end }}
{{- else -}}
- ipBlock: {cidr: 0.0.0.0/0, except: [169.254.169.254/32]}
- ipBlock: {cidr: "::/0", except: ["fd00:ec2::254/128"]}
{{- end -}}
{{- end -}}

{{/* Port of the store, from its address. */}}
{{- define "moe-asr.storePort" -}}
{{- $url := urlParse .Values.store.endpointUrl -}}
{{- if contains ":" (last (splitList "]" $url.host)) -}}
{{- last (splitList ":" $url.host) -}}
{{- else -}}
{{- ternary 80 443 (eq $url.scheme "http") -}}
{{- end -}}
{{- end -}}
