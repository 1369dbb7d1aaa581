{{- /*
Combinations that cannot work, all of them at once, by the names of the values. They are not in the
schema, as a part of a combination may stand for all models and another for one.
*/}}
{{- define "driftmill.validate" -}}
{{- $problems := concat (include "driftmill.problems.release" . | fromJsonArray) (include "driftmill.problems.models" . | fromJsonArray) -}}
{{- if $problems -}}
{{- fail (printf "\n\nThe values do not fit together:\n- %s\n" (join "\n- " $problems)) -}}
{{- end -}}
{{- end -}}

{{- /* What concerns the whole release, as a JSON list. Takes the root. */}}
{{- define "driftmill.problems.release" -}}
{{- $problems := list -}}
{{- $store := .Values.store -}}
{{- if not .Values.models -}}
{{- $problems = append $problems "models is empty: `driftmill compile CONTRACT -o build/` writes one, add -f build/values.yaml" -}}
{{- end -}}
{{- if not (regexMatch "^[a-z]" (include "driftmill.fullname" .)) -}}
{{- $problems = append $problems (printf "the release is called %s, and names of Services begin with a letter: call it otherwise, or set fullnameOverride" .Release.Name) -}}
{{- end -}}
{{- if eq $store.type "s3" -}}
{{- if not $store.uri -}}
{{- $problems = append $problems "store.type is s3 and store.uri is empty: set store.uri to a bucket, as in s3://models/driftmill" -}}
{{- end -}}
{{- else if $store.uri -}}
{{- $problems = append $problems (printf "store.uri is %s and store.type is %s, which does not read it: set store.type to s3, or store.uri to \"\"" $store.uri $store.type) -}}
{{- end -}}
{{- if and (eq $store.type "pvc") (has "ReadWriteOncePod" $store.pvc.accessModes) -}}
{{- $problems = append $problems "store.pvc.accessModes has ReadWriteOncePod, and several pods mount the store: use ReadWriteMany" -}}
{{- end -}}
{{- if eq $store.type "image" -}}
{{- if not $store.image.reference -}}
{{- $problems = append $problems "store.type is image and store.image.reference is empty: set it to the image that holds the store" -}}
{{- end -}}
{{- if semverCompare "<1.33.0-0" .Capabilities.KubeVersion.Version -}}
{{- $problems = append $problems (printf "store.type is image, and Kubernetes %s does not mount images (1.33 does): use s3 or pvc" .Capabilities.KubeVersion.Version) -}}
{{- end -}}
{{- end -}}
{{- if and (ne .Values.route.mode "never") (not .Values.route.parentRefs) -}}
{{- $problems = append $problems (printf "route.mode is %s and route.parentRefs is empty: name the Gateway, as in [{name: public, namespace: gateways}]" .Values.route.mode) -}}
{{- end -}}
{{- $problems | toJson -}}
{{- end -}}

{{- /* What concerns the models, as a JSON list. Takes the root. */}}
{{- define "driftmill.problems.models" -}}
{{- $problems := list -}}
{{- $store := .Values.store -}}
{{- $claims := dict -}}
{{- $accounts := dict -}}
{{- range $model := keys .Values.models | sortAlpha -}}
{{- $given := index $.Values.models $model -}}
{{- $service := include "driftmill.settings" (dict "root" $ "name" $model "part" "service") | fromYaml -}}
{{- $monitor := include "driftmill.settings" (dict "root" $ "name" $model "part" "monitor") | fromYaml -}}
{{- $controller := include "driftmill.settings" (dict "root" $ "name" $model "part" "controller") | fromYaml -}}
{{- $training := include "driftmill.settings" (dict "root" $ "name" $model "part" "training") | fromYaml -}}
{{- $found := list -}}

{{- range list "access" "canary" "contract" "controller" "ledger" "monitor" "schedule" "token" "training" "unschedule" -}}
{{- $other := printf "%s-%s" $model . -}}
{{- if hasKey $.Values.models $other -}}
{{- $found = append $found (printf "models has %s, too, which is what an object of %s is called: give it another name" $other $model) -}}
{{- end -}}
{{- end -}}
{{- $contract := fromYaml $given.contract -}}
{{- if $contract.Error -}}
{{- $found = append $found "contract is not YAML: write it again by `driftmill compile CONTRACT`" -}}
{{- else -}}
{{- if ne ($contract.model | toString) $model -}}
{{- $found = append $found (printf "contract is that of the model %v: models.%s must be called as its contract says" $contract.model $model) -}}
{{- end -}}
{{- $kind := $given.kind | default "tabular" -}}
{{- if ne (eq $kind "vision") (eq ($contract.task | toString) "image-classification") -}}
{{- $found = append $found (printf "kind is %s, and the contract's task is %v: they do not fit" $kind $contract.task) -}}
{{- end -}}
{{- $nodes := dig "train" "resources" "nodes" 1 $contract | int -}}
{{- if and (gt $nodes 1) $controller.enabled (eq $controller.runner "job") -}}
{{- $found = append $found (printf "controller.runner is job and the contract's train.resources.nodes is %d: a Job is one pod, set controller.runner to kubeflow" $nodes) -}}
{{- end -}}
{{- if and (gt $nodes 1) (eq $training.recurring.type "cronjob") -}}
{{- $found = append $found (printf "training.recurring.type is cronjob and the contract's train.resources.nodes is %d: a Job is one pod, set training.recurring.type to kubeflow" $nodes) -}}
{{- end -}}
{{- end -}}

{{- $scaling := $service.autoscaling -}}
{{- if and $service.enabled (ne $scaling.type "none") -}}
{{- if gt ($scaling.minReplicas | int) ($scaling.maxReplicas | int) -}}
{{- $found = append $found (printf "service.autoscaling.minReplicas is %v and maxReplicas %v: the least must not be more than the most" $scaling.minReplicas $scaling.maxReplicas) -}}
{{- end -}}
{{- if and (eq $scaling.type "hpa") (not (dig "requests" "cpu" "" $service.resources)) -}}
{{- $found = append $found "service.autoscaling.type is hpa and service.resources.requests.cpu is missing: set it, the CPU is measured by it" -}}
{{- end -}}
{{- end -}}
{{- if and $service.canary.weight (not $service.canary.enabled) -}}
{{- $found = append $found (printf "service.canary.weight is %v and service.canary.enabled is false: enable the canary, or set the weight to 0" $service.canary.weight) -}}
{{- end -}}
{{- if and $service.canary.weight $service.canary.enabled (eq $.Values.route.mode "never") -}}
{{- $found = append $found (printf "service.canary.weight is %v and route.mode is never: only a route gives weights, set route.mode" $service.canary.weight) -}}
{{- end -}}
{{- if eq $store.type "image" -}}
{{- range $part, $settings := dict "monitor" $monitor "controller" $controller -}}
{{- if $settings.enabled -}}
{{- $found = append $found (printf "store.type is image and %s.enabled is true: nothing can be written into an image, set %s.enabled to false" $part $part) -}}
{{- end -}}
{{- end -}}
{{- if ne $training.recurring.type "none" -}}
{{- $found = append $found (printf "store.type is image and training.recurring.type is %s: nothing can be written into an image, set it to none" $training.recurring.type) -}}
{{- end -}}
{{- end -}}

{{- if eq $store.type "pvc" -}}
{{- if and $controller.enabled (eq $controller.runner "kubeflow") -}}
{{- $found = append $found "store.type is pvc and controller.runner is kubeflow, whose pods do not mount it: set store.type to s3, or controller.runner to job" -}}
{{- end -}}
{{- if eq $training.recurring.type "kubeflow" -}}
{{- $found = append $found "store.type is pvc and training.recurring.type is kubeflow, whose pods do not mount it: set store.type to s3, or training.recurring.type to cronjob" -}}
{{- end -}}
{{- end -}}

{{- if $controller.enabled -}}
{{- if ne $training.recurring.type "none" -}}
{{- $found = append $found (printf "training.recurring.type is %s and controller.enabled is true: both would train; the controller does it by the contract's retrain.schedule, set training.recurring.type to none" $training.recurring.type) -}}
{{- end -}}
{{- $ledger := $controller.ledger -}}
{{- if eq $ledger.type "sqlite" -}}
{{- if gt ($controller.replicas | int) 1 -}}
{{- $found = append $found (printf "controller.replicas is %v and controller.ledger.type is sqlite, which one pod writes: set replicas to 1, or the type to postgres" $controller.replicas) -}}
{{- end -}}
{{- with $ledger.pvc.existingClaim -}}
{{- if hasKey $claims . -}}
{{- $found = append $found (printf "controller.ledger.pvc.existingClaim is %s, as for %s: two controllers cannot share a ledger of SQLite" . (get $claims .)) -}}
{{- end -}}
{{- $_ := set $claims . $model -}}
{{- end -}}
{{- else if not $ledger.existingSecret -}}
{{- $found = append $found "controller.ledger.type is postgres and controller.ledger.existingSecret is empty: name the Secret that holds its URL" -}}
{{- end -}}
{{- $account := $controller.serviceAccount -}}
{{- if and (not $account.create) (not $account.name) (eq $controller.runner "job") -}}
{{- $found = append $found "controller.serviceAccount.create is false and its name is empty: name one, or the namespace's default account would get the right to make Jobs" -}}
{{- end -}}
{{- if and $account.create $account.name -}}
{{- if hasKey $accounts $account.name -}}
{{- $found = append $found (printf "controller.serviceAccount.name is %s, as for %s: make it yourself and set create to false, or give each model its own" $account.name (get $accounts $account.name)) -}}
{{- end -}}
{{- $_ := set $accounts $account.name $model -}}
{{- end -}}
{{- else if and $monitor.enabled (eq $monitor.webhook "direct") -}}
{{- $found = append $found "monitor.webhook is direct and controller.enabled is false: there is nobody to tell, set it to auto" -}}
{{- end -}}

{{- range $found -}}
{{- $problems = append $problems (printf "model %s: %s" $model .) -}}
{{- end -}}
{{- end -}}
{{- $problems | toJson -}}
{{- end -}}
