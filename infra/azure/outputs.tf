module "release" {
  source = "../modules/release"

  folder   = "infra/azure"
  connect  = "az aks get-credentials --subscription ${var.subscription} --resource-group ${azurerm_resource_group.all.name} --name ${module.aks.name} && kubelogin convert-kubeconfig -l azurecli"
  login    = "az acr login --name ${module.registry.name}"
  registry = "${module.registry.login_server}/${local.name}"
  mlflow   = module.policy.mlflow
  store = {
    storage_class = "driftmill-files"
  }
  # A share by NFS: several pods write to it, and a hard link, by which a store makes a file exactly
  # once, works as on a disk.
  extra_objects = [{
    apiVersion           = "storage.k8s.io/v1"
    kind                 = "StorageClass"
    metadata             = { name = "driftmill-files" }
    provisioner          = "file.csi.azure.com"
    parameters           = { protocol = "nfs", skuName = "Premium_ZRS", networkEndpointType = "privateEndpoint" }
    reclaimPolicy        = "Retain"
    allowVolumeExpansion = true
    mountOptions         = ["nconnect=4", "actimeo=1"]
  }]
  annotations = {
    store  = { "azure.workload.identity/client-id" = azurerm_user_assigned_identity.store.client_id }
    runner = { "azure.workload.identity/client-id" = azurerm_user_assigned_identity.store.client_id }
  }
  ledger = {
    host     = module.postgres.fqdn
    user     = "driftmill"
    password = "printenv TF_VAR_database_password"
  }
  expander = module.policy.expander
  addons = [
    # By itself it tolerates the taint of GPUs, and not that of spot.
    "helm upgrade --install nvidia-device-plugin nvidia-device-plugin --repo https://nvidia.github.io/k8s-device-plugin --version ${module.policy.charts.device_plugin} --namespace kube-system --set-json 'tolerations=[{\"operator\":\"Exists\"}]'",
  ]
}

output "helm_values" {
  description = "Values of the chart helm/driftmill: -f this file, after those of `driftmill compile`."
  value       = module.release.helm_values
}

output "commands" {
  description = "The lines to run now: terraform output -raw commands."
  value       = module.release.commands
}
