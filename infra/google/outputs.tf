locals {
  host = "${module.policy.region}-docker.pkg.dev"
}

module "release" {
  source = "../modules/release"

  folder   = "infra/google"
  connect  = "gcloud container clusters get-credentials ${module.gke.name} --region ${module.policy.region} --project ${var.project}${length(var.admin_cidrs) == 0 ? " --internal-ip" : ""}"
  login    = "gcloud auth configure-docker ${local.host}"
  registry = "${local.host}/${var.project}/${google_artifact_registry_repository.images.repository_id}"
  extras   = "gcsfs"
  mlflow   = module.policy.mlflow
  store = {
    uri    = "gs://${module.buckets["store"].name}/driftmill"
    region = module.policy.region
  }
  metadata_server = true
  ledger = {
    host     = module.postgres.private_ip_address
    user     = "driftmill"
    password = "printenv TF_VAR_database_password"
  }
  pipelines = module.policy.pipelines ? {
    mysql    = module.mysql[0].private_ip_address
    user     = "driftmill"
    password = "printenv TF_VAR_database_password"
    host     = "storage.googleapis.com"
    region   = "auto"
    bucket   = module.buckets["pipelines"].name
    keys     = true
  } : null
  keys = module.policy.pipelines ? "gcloud storage hmac create ${google_service_account.pipelines[0].email} --project ${var.project} --format='value(metadata.accessId,secret)'" : ""
}

output "helm_values" {
  description = "Values of the chart helm/driftmill: -f this file, after those of `driftmill compile`."
  value       = module.release.helm_values
}

output "overlay" {
  description = "kustomization.yaml of Kubeflow Pipelines, for a folder beside k8s/overlays/production."
  value       = module.release.overlay
}

output "commands" {
  description = "The lines to run now: terraform output -raw commands."
  value       = module.release.commands
}
