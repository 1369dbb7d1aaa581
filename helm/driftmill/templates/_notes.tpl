{{- /* What NOTES.txt is made of. */}}

{{- /* A command that asks a model for a prediction, with its own columns: dict root model header (what
curl sends more). */}}
{{- define "driftmill.sample" -}}
{{- $model := index .root.Values.models .model -}}
{{- $contract := fromYaml $model.contract -}}
{{- $columns := dig "data" "columns" list $contract -}}
{{- if eq ($model.kind | default "tabular") "vision" -}}
curl localhost:3000/predict{{ .header }} -H 'content-type: image/png' --data-binary @image.png
{{- else if $columns -}}
{{- $record := dict -}}
{{- range $columns -}}
{{- $value := 1 -}}
{{- if eq .type "bool" -}}
{{- $value = true -}}
{{- else if eq .type "category" -}}
{{- $value = first (concat (.categories | default list) (list "a")) -}}
{{- else if not (kindIs "invalid" .min) -}}
{{- $value = .min -}}
{{- else if not (kindIs "invalid" .max) -}}
{{- $value = .max -}}
{{- end -}}
{{- $_ := set $record .name $value -}}
{{- end -}}
curl localhost:3000/predict{{ .header }} -H 'content-type: application/json' -d '{{ toJson $record | replace "'" "'\\''" }}'
{{- else -}}
curl localhost:3000/model{{ .header }}    # its "schema" says what /predict takes
{{- end -}}
{{- end -}}

{{- /* Where first models come from: lines, as a JSON list. Takes the root. */}}
{{- define "driftmill.firsts" -}}
{{- $trained := list -}}
{{- $waiting := list -}}
{{- if ne .Values.store.type "image" -}}
{{- range $model := keys .Values.models | sortAlpha -}}
{{- $controller := include "driftmill.settings" (dict "root" $ "name" $model "part" "controller") | fromYaml -}}
{{- if and $controller.enabled $controller.trainFirst -}}
{{- $trained = append $trained $model -}}
{{- else -}}
{{- $waiting = append $waiting $model -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- $lines := list -}}
{{- with $trained -}}
{{- $lines = append $lines (printf "Where the store has no model yet, the first is trained now, and until then pods run and are not Ready: %s." (join ", " .)) -}}
{{- end -}}
{{- with $waiting -}}
{{- $lines = append $lines (printf "Pods are Ready once the store has a model, which nothing here trains at once: %s." (join ", " .)) -}}
{{- end -}}
{{- $lines | toJson -}}
{{- end -}}

{{- /* What is not as one may expect, a line each. Takes the root. */}}
{{- define "driftmill.missing" -}}
{{- $objects := .Values.monitoring -}}
{{- $unknown := list -}}
{{- range $value, $kind := dict "serviceMonitor" "v1/ServiceMonitor" "prometheusRule" "v1/PrometheusRule" "alertmanagerConfig" "v1alpha1/AlertmanagerConfig" -}}
{{- if and (eq (get $objects $value).mode "skipIfMissing") (not ($.Capabilities.APIVersions.Has (printf "monitoring.coreos.com/%s" $kind))) }}
{{- $unknown = append $unknown (base $kind) -}}
{{- end }}
{{- end }}
{{- if $unknown }}
- The cluster does not know {{ join ", " $unknown }}, so none was made: install the Prometheus operator and `helm upgrade`.
{{- end }}
{{- $routed := include "driftmill.mode" (dict "root" $ "mode" .Values.route.mode "value" "route.mode" "api" "gateway.networking.k8s.io/v1/HTTPRoute" "install" "the Gateway API's CRDs") }}
{{- $outside := $routed }}
{{- $posting := list -}}
{{- range $model := keys .Values.models | sortAlpha }}
{{- if include "driftmill.posts" (dict "root" $ "model" $model) }}
{{- $posting = append $posting $model }}
{{- end }}
{{- $service := include "driftmill.settings" (dict "root" $ "name" $model "part" "service") | fromYaml }}
{{- if ne $service.type "ClusterIP" }}
{{- $outside = "true" }}
{{- end }}
{{- if and $routed $service.enabled $service.canary.enabled $service.canary.weight (eq (include "driftmill.canaryWeight" (dict "root" $ "model" $model "weight" $service.canary.weight)) "0") }}
- {{ $model }}: no pod of the canary is ready yet, so it gets no requests: `helm upgrade` again once one is.
{{- end }}
{{- end }}
{{- if and (eq .Values.route.mode "skipIfMissing") (not $routed) }}
- The cluster does not know HTTPRoute, so none was made: install the Gateway API's CRDs and `helm upgrade`.
{{- end }}
{{- if and $outside .Values.networkPolicy.enabled }}
- networkPolicy.clients must name the namespace or the addresses of what stands before the services.
{{- end }}
{{- if $posting }}
- The monitor tells the controller of drift itself, not by Alertmanager: {{ join ", " $posting }}.
{{- end }}
{{- if and (eq .Values.store.type "pvc") (not .Values.store.pvc.existingClaim) .Values.store.pvc.keep }}
- The claim {{ include "driftmill.storeClaim" . }} stays when the release is uninstalled (store.pvc.keep).
{{- end }}
{{- if not .Values.networkPolicy.enabled }}
- networkPolicy.enabled is false: every pod of the cluster may call the services, monitors and controllers.
{{- end }}
{{- end -}}
