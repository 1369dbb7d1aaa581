# Driftmill on Azure: AKS, Azure Files, Blob Storage, PostgreSQL, Container Registry. ../README.md
# says how to use it.
#
# Modules are pinned by commit, for tags can be moved; the version stands behind it. Microsoft's
# modules report their use home unless `enable_telemetry` is false.

locals {
  description = yamldecode(file(var.platform))
  name        = module.policy.name
  location    = module.policy.region
  zones       = slice(["1", "2", "3"], 0, module.policy.zones)
  tags        = { project = local.name, managed-by = "terraform" }
  # Some names are those of the whole world, and take letters and digits alone.
  unique = "${replace(local.name, "-", "")}${substr(sha256("${var.subscription}${local.name}"), 0, 6)}"
}

data "azurerm_client_config" "me" {}

module "policy" {
  source = "../modules/policy"

  cloud    = "azure"
  platform = local.description
  given    = local.description
}

resource "azurerm_resource_group" "all" {
  name     = local.name
  location = local.location
  tags     = local.tags
}

resource "azurerm_management_lock" "all" {
  count = var.deletion_protection ? 1 : 0

  name       = "keep"
  scope      = azurerm_resource_group.all.id
  lock_level = "CanNotDelete"
}

# Network: nodes, the database and what is reached by a private endpoint each have a subnet.

module "network" {
  source = "git::https://github.com/Azure/terraform-azurerm-avm-res-network-virtualnetwork.git?ref=462587b51f3cb91bac6ca3bf6d8eff93ba13f6f5" # v0.22.1

  name             = local.name
  location         = local.location
  parent_id        = azurerm_resource_group.all.id
  address_space    = [var.network]
  enable_telemetry = false
  tags             = local.tags
  subnets = {
    nodes     = { name = "nodes", address_prefixes = [cidrsubnet(var.network, 4, 0)] }
    endpoints = { name = "endpoints", address_prefixes = [cidrsubnet(var.network, 8, 64)] }
    database = {
      name             = "database"
      address_prefixes = [cidrsubnet(var.network, 8, 65)]
      delegations = [{
        name               = "postgres"
        service_delegation = { name = "Microsoft.DBforPostgreSQL/flexibleServers" }
      }]
    }
  }
}

resource "azurerm_private_dns_zone" "private" {
  for_each = {
    blob     = "privatelink.blob.core.windows.net"
    postgres = "${local.name}.private.postgres.database.azure.com"
  }

  name                = each.value
  resource_group_name = azurerm_resource_group.all.name
  tags                = local.tags
}

resource "azurerm_private_dns_zone_virtual_network_link" "private" {
  for_each = azurerm_private_dns_zone.private

  name                  = local.name
  resource_group_name   = azurerm_resource_group.all.name
  private_dns_zone_name = each.value.name
  virtual_network_id    = module.network.resource_id
}

# Cluster.

resource "azurerm_user_assigned_identity" "cluster" {
  name                = "${local.name}-cluster"
  location            = local.location
  resource_group_name = azurerm_resource_group.all.name
  tags                = local.tags
}

resource "azurerm_role_assignment" "cluster" {
  scope                = module.network.resource_id
  role_definition_name = "Network Contributor"
  principal_id         = azurerm_user_assigned_identity.cluster.principal_id
}

module "aks" {
  source     = "git::https://github.com/Azure/terraform-azurerm-avm-res-containerservice-managedcluster.git?ref=2802831334a48042067aeff0be67212947cd3cfb" # v0.8.1
  depends_on = [azurerm_role_assignment.cluster]

  name               = local.name
  location           = local.location
  parent_id          = azurerm_resource_group.all.id
  dns_prefix         = local.name
  kubernetes_version = module.policy.kubernetes
  sku                = { name = "Base", tier = "Standard" }
  enable_telemetry   = false
  tags               = local.tags

  managed_identities     = { user_assigned_resource_ids = [azurerm_user_assigned_identity.cluster.id] }
  disable_local_accounts = true
  aad_profile = {
    managed                = true
    enable_azure_rbac      = true
    tenant_id              = data.azurerm_client_config.me.tenant_id
    admin_group_object_ids = var.admin_groups
  }
  api_server_access_profile = {
    enable_private_cluster = length(var.admin_cidrs) == 0
    authorized_ip_ranges   = length(var.admin_cidrs) > 0 ? var.admin_cidrs : null
  }
  oidc_issuer_profile  = { enabled = true }
  security_profile     = { workload_identity = { enabled = true } }
  auto_upgrade_profile = { upgrade_channel = "patch", node_os_upgrade_channel = "NodeImage" }

  # Cilium applies network policies.
  network_profile = {
    network_plugin      = "azure"
    network_plugin_mode = "overlay"
    network_policy      = "cilium"
    network_dataplane   = "cilium"
    load_balancer_sku   = "standard"
    outbound_type       = "loadBalancer"
    pod_cidr            = "10.64.0.0/14"
    service_cidr        = "10.68.0.0/20"
    dns_service_ip      = "10.68.0.10"
  }

  # The order of pools is in a ConfigMap, which `commands` makes: spot first.
  auto_scaler_profile = { expander = "priority" }

  default_agent_pool = {
    name                = "cpu"
    vm_size             = module.policy.cpu_pool.machine
    enable_auto_scaling = true
    count_of            = module.policy.cpu_pool.min
    min_count           = module.policy.cpu_pool.min
    max_count           = module.policy.cpu_pool.max
    node_labels         = module.policy.cpu_pool.labels
    availability_zones  = local.zones
    os_disk_size_gb     = 100
    vnet_subnet_id      = module.network.subnets["nodes"].resource_id
  }

  agent_pools = {
    for name, pool in module.policy.gpu_pools : name => {
      name                      = name
      mode                      = "User"
      vm_size                   = pool.machine
      enable_auto_scaling       = true
      count_of                  = pool.min
      min_count                 = pool.min
      max_count                 = pool.max
      scale_set_priority        = pool.spot ? "Spot" : "Regular"
      scale_set_eviction_policy = pool.spot ? "Delete" : null
      spot_max_price            = pool.spot ? -1 : null # never more than on demand
      node_labels               = pool.labels
      node_taints               = [for taint in pool.taints : "${taint.key}=${taint.value}:${taint.effect}"]
      os_disk_size_gb           = 100 # images with CUDA take 5 GB each
      vnet_subnet_id            = module.network.subnets["nodes"].resource_id
    }
  }
}

# Stores. Driftmill keeps its own in a folder of Azure Files by NFS, for it speaks to S3 and Google
# but not to Blob Storage; the chart's storage class makes the share (outputs.tf). Blob Storage has
# backups of it and training data.

module "blobs" {
  source = "git::https://github.com/Azure/terraform-azurerm-avm-res-storage-storageaccount.git?ref=9cd53ea0f2904c1f32c861428a31748e8717382e" # v0.9.0

  name             = local.unique
  location         = local.location
  parent_id        = azurerm_resource_group.all.id
  account_kind     = "StorageV2"
  account_sku_name = "Standard_ZRS"
  enable_telemetry = false
  tags             = local.tags

  public_network_access_enabled   = false
  shared_access_key_enabled       = false
  allow_nested_items_to_be_public = false
  min_tls_version                 = "TLS1_2"

  containers = { for name in ["backups", "data"] : name => { name = name } }
  blob_properties = {
    versioning_enabled                = true
    delete_retention_policy           = { enabled = true, days = module.policy.retention.versions }
    container_delete_retention_policy = { enabled = true, days = module.policy.retention.versions }
  }
  storage_management_policy_rule = {
    versions = {
      name    = "old-versions"
      enabled = true
      filters = { blob_types = ["blockBlob"] }
      actions = {
        version = { delete_after_days_since_creation = module.policy.retention.versions }
      }
    }
  }
  private_endpoints = {
    blob = {
      subnet_resource_id            = module.network.subnets["endpoints"].resource_id
      subresource_name              = "blob"
      private_dns_zone_resource_ids = [azurerm_private_dns_zone.private["blob"].id]
    }
  }
}

# Database: PostgreSQL for the ledger and MLflow.

module "postgres" {
  source     = "git::https://github.com/Azure/terraform-azurerm-avm-res-dbforpostgresql-flexibleserver.git?ref=70d6e9c947f8b2c24b706bb3484228d53cf7858a" # v0.2.3
  depends_on = [azurerm_private_dns_zone_virtual_network_link.private]

  name                = "${local.unique}-postgres"
  location            = local.location
  resource_group_name = azurerm_resource_group.all.name
  server_version      = "16"
  sku_name            = module.policy.database.machine
  # Disks come in powers of two from 32 GiB.
  storage_mb        = pow(2, max(5, ceil(log(module.policy.database.disk, 2)))) * 1024
  high_availability = module.policy.database.standby ? { mode = "ZoneRedundant" } : null
  zone              = "1"
  enable_telemetry  = false
  tags              = local.tags

  administrator_login               = "driftmill"
  administrator_password_wo         = var.database_password
  administrator_password_wo_version = var.database_password_version

  public_network_access_enabled = false
  delegated_subnet_id           = module.network.subnets["database"].resource_id
  private_dns_zone_id           = azurerm_private_dns_zone.private["postgres"].id
  backup_retention_days         = module.policy.database.backups
  databases                     = { driftmill = { name = "driftmill" } }
}

# Registry. It is reached by its name over the internet, so that images can be pushed from where they
# are built; there is no admin user, and nobody pulls without an identity.

module "registry" {
  source = "git::https://github.com/Azure/terraform-azurerm-avm-res-containerregistry-registry.git?ref=4a032f5cf4607536008c217efdc3f06dda45f33c" # v0.8.0

  name                     = local.unique
  location                 = local.location
  resource_group_name      = azurerm_resource_group.all.name
  sku                      = "Standard"
  admin_enabled            = false
  anonymous_pull_enabled   = false
  zone_redundancy_enabled  = false # these two come with Premium alone
  retention_policy_in_days = null
  enable_telemetry         = false
  tags                     = local.tags
}

resource "azurerm_role_assignment" "pull" {
  scope                = module.registry.resource_id
  role_definition_name = "AcrPull"
  principal_id         = module.aks.kubelet_identity.objectId
}

# Rights of pods: an identity that only the named service accounts may take, by the cluster's own
# identity provider. No key is made anywhere.

resource "azurerm_user_assigned_identity" "store" {
  name                = "${local.name}-store"
  location            = local.location
  resource_group_name = azurerm_resource_group.all.name
  tags                = local.tags
}

resource "azurerm_federated_identity_credential" "store" {
  for_each = toset(concat(module.policy.accounts.store, module.policy.accounts.runner))

  name                = replace(each.key, ":", "-")
  resource_group_name = azurerm_resource_group.all.name
  parent_id           = azurerm_user_assigned_identity.store.id
  issuer              = module.aks.oidc_issuer_profile_issuer_url
  subject             = "system:serviceaccount:${each.key}"
  audience            = ["api://AzureADTokenExchange"]
}

resource "azurerm_role_assignment" "blobs" {
  scope                = module.blobs.resource_id
  role_definition_name = "Storage Blob Data Contributor"
  principal_id         = azurerm_user_assigned_identity.store.principal_id
}

# Budget: an e-mail when half, four fifths and all of it is spent, and when more is foreseen.

resource "azurerm_consumption_budget_resource_group" "monthly" {
  name              = local.name
  resource_group_id = azurerm_resource_group.all.id
  amount            = module.policy.budget.monthly
  time_grain        = "Monthly"

  time_period {
    start_date = "${var.budget_start}T00:00:00Z"
  }

  dynamic "notification" {
    for_each = concat(
      [for share in module.policy.budget.spent : { type = "Actual", share = share }],
      [for share in module.policy.budget.foreseen : { type = "Forecasted", share = share }],
    )
    content {
      operator       = "GreaterThan"
      threshold      = notification.value.share
      threshold_type = notification.value.type
      contact_emails = module.policy.budget.emails
    }
  }
}
