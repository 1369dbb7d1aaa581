{{- /* Names */}}

{{- /* Release and chart in one name, as `helm create` has it. Takes the root. */}}
{{- define "driftmill.fullname" -}}
{{- $chart := .Values.nameOverride | default .Chart.Name -}}
{{- $name := contains $chart .Release.Name | ternary .Release.Name (printf "%s-%s" .Release.Name $chart) -}}
{{- .Values.fullnameOverride | default $name | trunc 63 | trimSuffix "-" -}}
{{- end -}}

{{- /*
The name of an object: dict root [model] [suffix] [most]. A name that is too long (63 characters, or
`most`) is cut, and a digest of all of it keeps it apart from others.
*/}}
{{- define "driftmill.name" -}}
{{- $full := list (include "driftmill.fullname" .root) .model .suffix | compact | join "-" -}}
{{- $most := .most | default 63 | int -}}
{{- if gt (len $full) $most -}}
{{- $tail := list (sha256sum $full | trunc 8) .suffix | compact | join "-" -}}
{{- $full = printf "%s-%s" ($full | trunc (sub $most (add (len $tail) 1) | int) | trimSuffix "-") $tail -}}
{{- end -}}
{{- $full -}}
{{- end -}}

{{- /* Where a model's controller takes alarms: dict root model. */}}
{{- define "driftmill.webhook" -}}
http://{{ include "driftmill.name" (dict "root" .root "model" .model "suffix" "controller") }}.{{ .root.Release.Namespace }}.svc:3002/alerts
{{- end -}}

{{- /* The Secret with the token of a model's controller: dict root model controller (its settings). */}}
{{- define "driftmill.tokenSecret" -}}
{{- .controller.token.existingSecret | default (include "driftmill.name" (dict "root" .root "model" .model "suffix" "token")) -}}
{{- end -}}

{{- /* The Secret with the tokens of a model's service: dict root model service (its settings). */}}
{{- define "driftmill.accessSecret" -}}
{{- .service.access.existingSecret | default (include "driftmill.name" (dict "root" .root "model" .model "suffix" "access")) -}}
{{- end -}}

{{- /* That Secret as a folder: its volume, and where it is mounted. Takes the same. */}}
{{- define "driftmill.tokensVolume" -}}
- name: tokens
  secret: {secretName: {{ include "driftmill.accessSecret" . | quote }}}
{{- end -}}

{{- define "driftmill.tokensMount" -}}
- {name: tokens, mountPath: /etc/driftmill/tokens, readOnly: true}
{{- end -}}

{{- /* The account of all pods but the controllers'. Takes the root. */}}
{{- define "driftmill.account" -}}
{{- $own := .Values.serviceAccount.create | ternary (include "driftmill.fullname" .) "default" -}}
{{- .Values.serviceAccount.name | default $own -}}
{{- end -}}

{{- /* A controller's account: dict root model controller. */}}
{{- define "driftmill.controllerAccount" -}}
{{- $own := include "driftmill.name" (dict "root" .root "model" .model "suffix" "controller") -}}
{{- .controller.serviceAccount.name | default (.controller.serviceAccount.create | ternary $own "default") -}}
{{- end -}}

{{- /* The claim of the store. Takes the root. */}}
{{- define "driftmill.storeClaim" -}}
{{- .Values.store.pvc.existingClaim | default (include "driftmill.name" (dict "root" . "suffix" "store")) -}}
{{- end -}}

{{- /* Labels and metadata */}}

{{- /* What the selectors of everything of the release have in common. Takes the root. */}}
{{- define "driftmill.selector" -}}
app.kubernetes.io/name: driftmill
app.kubernetes.io/instance: {{ .Release.Name | quote }}
{{- end -}}

{{- /* Selects the pods of one part of a model: dict root model component [track]. */}}
{{- define "driftmill.selectorLabels" -}}
{{ include "driftmill.selector" .root }}
app.kubernetes.io/component: {{ .component }}
driftmill/model: {{ .model | quote }}
{{- with .track }}
driftmill/track: {{ . }}
{{- end }}
{{- end -}}

{{- /*
Labels of an object: dict root [model] [component] [track] [labels]. More labels never take the place of
those by which the chart knows its objects.
*/}}
{{- define "driftmill.labels" -}}
{{- $own := include "driftmill.ownLabels" . | fromYaml -}}
{{- mergeOverwrite (deepCopy .root.Values.commonLabels) (.labels | default dict) $own | toYaml -}}
{{- end -}}

{{- define "driftmill.ownLabels" -}}
{{ include "driftmill.selector" .root }}
app.kubernetes.io/part-of: driftmill
app.kubernetes.io/managed-by: {{ .root.Release.Service }}
app.kubernetes.io/version: {{ .root.Chart.AppVersion | quote }}
helm.sh/chart: {{ printf "%s-%s" .root.Chart.Name .root.Chart.Version | replace "+" "_" }}
{{- with .component }}
app.kubernetes.io/component: {{ . }}
{{- end }}
{{- with .model }}
driftmill/model: {{ . | quote }}
{{- end }}
{{- with .track }}
driftmill/track: {{ . }}
{{- end }}
{{- end -}}

{{- /*
Metadata without the name: dict root [model] [component] [track] [labels] [annotations] [namespace].
*/}}
{{- define "driftmill.metadata" -}}
namespace: {{ .namespace | default .root.Release.Namespace }}
labels:
  {{- include "driftmill.labels" . | nindent 2 }}
{{- with mergeOverwrite (deepCopy .root.Values.commonAnnotations) (.annotations | default dict) }}
annotations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end -}}

{{- /*
Labels and annotations of a pod: dict root model component settings [track] [annotations] [secrets].
Nothing of the chart's version is in it, so that a new chart alone rolls no pods. An upgrade does where
one of the Secrets has changed from which the pod's environment comes.
*/}}
{{- define "driftmill.podMetadata" -}}
{{- $own := set (include "driftmill.selectorLabels" . | fromYaml) "app.kubernetes.io/part-of" "driftmill" -}}
labels:
  {{- mergeOverwrite (deepCopy .root.Values.commonLabels) .settings.podLabels $own | toYaml | nindent 2 }}
{{- $checks := dict -}}
{{- $data := list -}}
{{- range .secrets | default list | compact -}}
{{- $data = append $data (dig "data" "" (lookup "v1" "Secret" $.root.Release.Namespace .)) -}}
{{- end -}}
{{- with $data | compact -}}
{{- $checks = dict "checksum/secrets" (toJson . | sha256sum) -}}
{{- end -}}
{{- with mergeOverwrite (deepCopy .root.Values.commonAnnotations) .settings.podAnnotations (.annotations | default dict) $checks }}
annotations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end -}}

{{- /* Settings */}}

{{- /*
The settings of one part (service, monitor, controller, training) of a model, as YAML: those for all
models, and over them the model's own. dict root name part
*/}}
{{- define "driftmill.settings" -}}
{{- $own := get (index .root.Values.models .name) .part | default dict -}}
{{- mergeOverwrite (deepCopy (index .root.Values .part)) $own | toYaml -}}
{{- end -}}

{{- /*
"true" where an object is made whose kind the cluster may not know:
dict root mode value (its name) api (group/version/kind) install (what brings it).
*/}}
{{- define "driftmill.mode" -}}
{{- $known := .root.Capabilities.APIVersions.Has .api -}}
{{- if and (eq .mode "failIfMissing") (not $known) -}}
{{- fail (printf "\n\n%s is failIfMissing, and the cluster does not know %s: install %s, or set %s to skipIfMissing" .value .api .install .value) -}}
{{- end -}}
{{- if or (eq .mode "always") (and $known (ne .mode "never")) -}}true{{- end -}}
{{- end -}}

{{- /* "true" where a model's monitor tells its controller of alarms: dict root model. */}}
{{- define "driftmill.posts" -}}
{{- $controller := include "driftmill.settings" (dict "root" .root "name" .model "part" "controller") | fromYaml -}}
{{- $monitor := include "driftmill.settings" (dict "root" .root "name" .model "part" "monitor") | fromYaml -}}
{{- $routed := include "driftmill.mode" (dict "root" .root "mode" .root.Values.monitoring.alertmanagerConfig.mode "value" "monitoring.alertmanagerConfig.mode" "api" "monitoring.coreos.com/v1alpha1/AlertmanagerConfig" "install" "the Prometheus operator") -}}
{{- if and $controller.enabled (or (eq $monitor.webhook "direct") (and (eq $monitor.webhook "auto") (not $routed))) -}}
true
{{- end -}}
{{- end -}}

{{- /* More than one pod serves, whatever the load: "true". Takes the settings of a service. */}}
{{- define "driftmill.several" -}}
{{- $least := eq .autoscaling.type "none" | ternary .replicas .autoscaling.minReplicas | int -}}
{{- if gt $least 1 -}}true{{- end -}}
{{- end -}}

{{- /* Pods */}}

{{- /* The reference of an image: dict root image [tag] [digest], which come before the image's own. */}}
{{- define "driftmill.image" -}}
{{- $tag := .tag | default .image.tag | default .root.Chart.AppVersion -}}
{{- $digest := .digest | default (empty .tag | ternary .image.digest "") -}}
{{- if $digest -}}
{{ .image.repository }}@{{ $digest }}
{{- else -}}
{{ .image.repository }}:{{ $tag }}
{{- end -}}
{{- end -}}

{{- /* The image of a model's service or training: dict root model part (service, training) [tag] [digest]. */}}
{{- define "driftmill.imageOf" -}}
{{- $kind := (index .root.Values.models .model).kind | default "tabular" -}}
{{- $image := index .root.Values.images (printf "%s%s" .part (title $kind)) -}}
{{- include "driftmill.image" (dict "root" .root "image" $image "tag" .tag "digest" .digest) -}}
{{- end -}}

{{- /* What all pods have in common: dict root settings account [token]. */}}
{{- define "driftmill.pod" -}}
serviceAccountName: {{ quote .account }}
automountServiceAccountToken: {{ .token | default false }}
{{- /* A Service called driftmill-store would else put DRIFTMILL_STORE_… into the environment. */}}
enableServiceLinks: false
securityContext:
  {{- toYaml .root.Values.podSecurityContext | nindent 2 }}
{{- with .root.Values.images.pullSecrets }}
imagePullSecrets:
  {{- range . }}
  - name: {{ quote . }}
  {{- end }}
{{- end }}
{{- with .settings.nodeSelector }}
nodeSelector:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .settings.tolerations }}
tolerations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .settings.affinity }}
affinity:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .settings.priorityClassName }}
priorityClassName: {{ quote . }}
{{- end }}
{{- end -}}

{{- /* What all containers have in common: dict root image [settings]. */}}
{{- define "driftmill.container" -}}
image: {{ .image }}
imagePullPolicy: {{ .root.Values.images.pullPolicy }}
securityContext:
  {{- toYaml .root.Values.securityContext | nindent 2 }}
{{- with (.settings | default dict).resources }}
resources:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end -}}

{{- /*
The environment: the places and who may use them. dict root model settings [trains] (whether the pod
makes models) [more] (YAML of further variables).
*/}}
{{- define "driftmill.env" -}}
{{- $store := .root.Values.store -}}
env:
  - name: DRIFTMILL_MODEL
    value: {{ .model | quote }}
  - name: DRIFTMILL_HOME
    value: /var/lib/driftmill
  - name: DRIFTMILL_STORE
    value: {{ get (dict "s3" $store.uri "pvc" "/store" "image" "/store/copy") $store.type | quote }}
  {{- if and (eq $store.type "s3") (hasPrefix "s3:" $store.uri) }}
  - name: AWS_REGION
    value: {{ $store.region | quote }}
  {{- with $store.endpoint }}
  - name: AWS_ENDPOINT_URL
    value: {{ . | quote }}
  {{- end }}
  {{- include "driftmill.keys" (dict "secret" $store.existingSecret "keys" (list "AWS_ACCESS_KEY_ID" "AWS_SECRET_ACCESS_KEY")) | nindent 2 }}
  {{- end }}
  {{- with .root.Values.signing }}
  {{- if .existingSecret }}
  - name: DRIFTMILL_TRUSTED_KEYS
    valueFrom:
      secretKeyRef: {name: {{ quote .existingSecret }}, key: {{ quote .publicKey }}}
  {{- if and $.trains .privateKey }}
  - name: DRIFTMILL_SIGNING_KEY
    valueFrom:
      secretKeyRef: {name: {{ quote .existingSecret }}, key: {{ quote .privateKey }}}
  {{- end }}
  {{- end }}
  {{- end }}
  {{- if .trains }}
  {{- if .root.Values.tracking.uri }}
  - name: MLFLOW_TRACKING_URI
    value: {{ .root.Values.tracking.uri | quote }}
  {{- else if not (dig "tracking" "uri" "" ((index .root.Values.models .model).contract | fromYaml)) }}
  {{- /* Nowhere: the default is a file of SQLite, which would go with the pod. */}}
  - name: MLFLOW_TRACKING_URI
    value: none
  {{- end }}
  {{- include "driftmill.keys" (dict "secret" .root.Values.tracking.existingSecret "keys" (list "MLFLOW_TRACKING_USERNAME" "MLFLOW_TRACKING_PASSWORD")) | nindent 2 }}
  {{- end }}
  {{- with .more }}
  {{- . | nindent 2 }}
  {{- end }}
  {{- with .settings.extraEnv }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
{{- with .settings.extraEnvFrom }}
envFrom:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end -}}

{{- /* Variables from a Secret that may be missing: dict secret keys. */}}
{{- define "driftmill.keys" -}}
{{- $secret := .secret -}}
{{- if $secret -}}
{{- range $i, $key := .keys }}
{{- if $i }}
{{ end -}}
- name: {{ $key }}
  valueFrom:
    secretKeyRef: {name: {{ quote $secret }}, key: {{ $key }}, optional: true}
{{- end }}
{{- end -}}
{{- end -}}

{{- /* Volumes: dict root settings [home] (YAML of the volume at DRIFTMILL_HOME) [more] (YAML). */}}
{{- define "driftmill.volumes" -}}
volumes:
  - name: tmp
    emptyDir: {}
  - name: home
    {{- .home | default "emptyDir: {}" | nindent 4 }}
  {{- if eq .root.Values.store.type "pvc" }}
  - name: store
    persistentVolumeClaim:
      claimName: {{ include "driftmill.storeClaim" .root | quote }}
  {{- else if eq .root.Values.store.type "image" }}
  - name: store
    emptyDir: {}
  - name: store-image
    image:
      reference: {{ .root.Values.store.image.reference | quote }}
      pullPolicy: {{ .root.Values.store.image.pullPolicy }}
  {{- end }}
  {{- with .more }}
  {{- . | nindent 2 }}
  {{- end }}
  {{- with .settings.extraVolumes }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
{{- end -}}

{{- /* Where they are mounted: dict root settings [more] (YAML). */}}
{{- define "driftmill.mounts" -}}
volumeMounts:
  - {name: tmp, mountPath: /tmp}
  - {name: home, mountPath: /var/lib/driftmill}
  {{- if ne .root.Values.store.type "s3" }}
  - {name: store, mountPath: /store}
  {{- end }}
  {{- with .more }}
  {{- . | nindent 2 }}
  {{- end }}
  {{- with .settings.extraVolumeMounts }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
{{- end -}}

{{- /* A claim: dict root name claim (its settings) [model] [component]. */}}
{{- define "driftmill.claim" -}}
apiVersion: v1
kind: PersistentVolumeClaim
metadata:
  name: {{ .name }}
  {{- $annotations := .claim.keep | ternary (dict "helm.sh/resource-policy" "keep") dict }}
  {{- include "driftmill.metadata" (dict "root" .root "model" .model "component" .component "annotations" $annotations) | nindent 2 }}
spec:
  accessModes:
    {{- toYaml .claim.accessModes | nindent 4 }}
  {{- with .claim.storageClass }}
  storageClassName: {{ eq . "-" | ternary "" . | quote }}
  {{- end }}
  resources:
    requests:
      storage: {{ .claim.size }}
{{- end -}}
