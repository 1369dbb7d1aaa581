output "helm_values" {
  description = "Values of the chart helm/driftmill, as YAML."
  value       = yamlencode(local.values)
}

output "overlay" {
  description = "kustomization.yaml of Kubeflow Pipelines, for a folder beside k8s/overlays/production; empty where it is not installed."
  value = var.pipelines == null ? "" : templatefile("${path.module}/overlay.yaml.tftpl", {
    pipelines       = var.pipelines
    region          = var.store.region
    mlflow          = var.mlflow == "" ? "null" : var.mlflow # null takes away the example
    annotated       = local.annotated
    metadata_server = var.metadata_server
    egress          = local.egress[1]
  })
}

output "commands" {
  description = "The lines to run after `terraform apply`, in the repository's root."
  value = join("\n", concat(
    ["# the cluster", var.connect],
    var.expander == "" ? [] : [
      "kubectl -n kube-system create configmap cluster-autoscaler-priority-expander --from-literal=priorities='${trimspace(var.expander)}' --dry-run=client -o yaml | kubectl apply -f -",
    ],
    var.addons,
    ["", "# namespaces, accounts, policies; the Secret of the ledger"],
    var.pipelines == null ? ["kubectl apply --server-side -k k8s/base"] : [
      "mkdir -p k8s/overlays/mine && terraform -chdir=${var.folder} output -raw overlay > k8s/overlays/mine/kustomization.yaml",
      "kubectl apply --server-side -k k8s/base",
      "kubectl -n kubeflow create secret generic mysql-secret --from-literal=username=${var.pipelines.user} --from-literal=password=\"$(${var.pipelines.password})\"",
    ],
    var.keys == "" ? [] : [
      "read -r ACCESS SECRET <<< \"$(${var.keys})\"",
      "kubectl -n kubeflow create secret generic mlpipeline-minio-artifact --from-literal=accesskey=\"$ACCESS\" --from-literal=secretkey=\"$SECRET\"",
    ],
    ["kubectl -n driftmill create secret generic driftmill-ledger --from-literal=url=\"postgresql+psycopg://${var.ledger.user}:$(${var.ledger.password})@${var.ledger.host}/driftmill?sslmode=require\""],
    var.pipelines == null ? [] : [
      "", "# Kubeflow Pipelines",
      "kubectl apply --server-side -k k8s/pipelines/crds",
      "kubectl wait --for=condition=Established crd --all",
      "kubectl apply --server-side -k k8s/overlays/mine",
    ],
    ["", "# the images", var.login, "export DRIFTMILL_IMAGE_PREFIX=${var.registry}",
    "driftmill images build --push${var.extras == "" ? "" : " --extras ${var.extras}"}"],
    ["", "# a model",
      "driftmill compile CONTRACT",
      "terraform -chdir=${var.folder} output -raw helm_values > build/cloud.yaml",
    "helm upgrade --install driftmill helm/driftmill --namespace driftmill -f build/values.yaml -f build/cloud.yaml"],
    [""],
  ))
}
