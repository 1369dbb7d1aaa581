locals {
  host     = "${data.aws_caller_identity.me.account_id}.dkr.ecr.${module.policy.region}.amazonaws.com"
  password = { for name, made in module.databases : name => "aws secretsmanager get-secret-value --secret-id ${made.db_instance_master_user_secret_arn} --query SecretString --output text | jq -r '.password'" }
}

module "release" {
  source = "../modules/release"

  folder   = "infra/aws"
  connect  = "aws eks update-kubeconfig --region ${module.policy.region} --name ${module.eks.cluster_name}"
  login    = "aws ecr get-login-password --region ${module.policy.region} | docker login --username AWS --password-stdin ${local.host}"
  registry = "${local.host}/${local.name}"
  mlflow   = module.policy.mlflow
  store = {
    uri    = "s3://${module.buckets["store"].s3_bucket_id}/driftmill"
    region = module.policy.region
  }
  annotations = { for name, role in module.roles : name => { "eks.amazonaws.com/role-arn" = role.arn } }
  ledger = {
    host = module.databases["postgres"].db_instance_address
    user = "driftmill"
    # A password of RDS's making may hold what a URL must not.
    password = "${local.password["postgres"]} | jq -Rr @uri"
  }
  pipelines = module.policy.pipelines ? {
    mysql    = module.databases["mysql"].db_instance_address
    user     = "driftmill"
    password = local.password["mysql"]
    host     = "s3.${module.policy.region}.amazonaws.com"
    region   = module.policy.region
    bucket   = module.buckets["pipelines"].s3_bucket_id
    keys     = false
  } : null
  expander = module.policy.expander
  addons = [
    "helm upgrade --install cluster-autoscaler cluster-autoscaler --repo https://kubernetes.github.io/autoscaler --version ${module.policy.charts.autoscaler} --namespace kube-system --set autoDiscovery.clusterName=${module.eks.cluster_name} --set awsRegion=${module.policy.region} --set rbac.serviceAccount.name=cluster-autoscaler --set rbac.serviceAccount.annotations.\"eks\\.amazonaws\\.com/role-arn\"=${module.autoscaler_role.arn} --set extraArgs.expander=priority",
    # By itself it tolerates the taint of GPUs, and not that of spot.
    "helm upgrade --install nvidia-device-plugin nvidia-device-plugin --repo https://nvidia.github.io/k8s-device-plugin --version ${module.policy.charts.device_plugin} --namespace kube-system --set-json 'tolerations=[{\"operator\":\"Exists\"}]'",
  ]
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
