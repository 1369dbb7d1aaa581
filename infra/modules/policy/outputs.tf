output "name" {
  description = "Name of the cluster, first part of all other names."
  value       = var.platform.name
}

output "region" {
  description = "Region."
  value       = var.platform.regions[var.cloud]
}

output "zones" {
  description = "Number of zones."
  value       = var.platform.zones
}

output "kubernetes" {
  description = "Version of Kubernetes."
  value       = var.platform.kubernetes
}

output "cpu_pool" {
  description = "The pool of machines without GPUs."
  value = {
    machine = local.machines.cpu[var.cloud][tostring(var.platform.cpu.vcpus)]
    min     = var.platform.cpu.min
    max     = var.platform.cpu.max
    labels  = { "driftmill/pool" = "cpu" }
  }
}

output "gpu_pools" {
  description = "The pools of machines with GPUs, by name: spot and on demand apart."
  value       = local.gpu_pools
}

output "expander" {
  description = "Order in which Cluster Autoscaler tries pools, as its ConfigMap has it: the higher number first, so spot."
  value       = <<-EOT
    50:
    %{~for name, pool in local.gpu_pools~}
    %{~if pool.spot}
    - .*${name}.*
    %{~endif~}
    %{~endfor}
    10:
    - .*
  EOT
}

output "database" {
  description = "PostgreSQL and MySQL."
  value = {
    machine = local.machines.database[var.cloud][tostring(var.platform.database.vcpus)]
    disk    = var.platform.database.disk
    standby = var.platform.database.standby
    backups = var.platform.retention.backups
  }
}

output "pipelines" {
  description = "Whether Kubeflow Pipelines will be installed."
  value       = var.platform.pipelines
}

output "mlflow" {
  description = "URL of the MLflow server; empty: none."
  value       = var.platform.mlflow
}

output "retention" {
  description = "Days to keep what was replaced, logs and images."
  value       = var.platform.retention
}

output "budget" {
  description = "Budget, and the shares of it at which its alarm sounds: of what was spent, and of what is foreseen."
  value       = merge(var.platform.budget, { spent = [50, 80, 100], foreseen = [100] })
}

output "accounts" {
  description = "Kubernetes' service accounts that get rights in the cloud, as namespace:name."
  value = {
    store     = ["driftmill:driftmill", "driftmill:driftmill-controller"]            # the chart's
    runner    = ["kubeflow:driftmill-runner"]                                        # training runs
    pipelines = ["kubeflow:ml-pipeline", "kubeflow:ml-pipeline-ui", "kubeflow:argo"] # Kubeflow Pipelines' servers
  }
}

output "images" {
  description = "Names of the images that the registry holds."
  value = [
    "python-tabular", "python-vision", "python-vision-cuda",
    "service-tabular", "service-vision", "monitor", "controller",
  ]
}

output "charts" {
  description = "Versions of the charts that a cloud's cluster needs and does not bring."
  value       = { autoscaler = "9.50.1", device_plugin = "0.17.4" }
}
