# Driftmill on Google Cloud: GKE, Cloud Storage, Cloud SQL, Artifact Registry. ../README.md says how
# to use it.
#
# Modules are pinned by commit, for tags can be moved; the version stands behind it.

locals {
  description = yamldecode(file(var.platform))
  name        = module.policy.name
  zones       = slice(data.google_compute_zones.here.names, 0, module.policy.zones)
  labels      = { project = local.name, managed-by = "terraform" }
}

data "google_project" "me" {
  project_id = var.project
}

data "google_compute_zones" "here" {
  project = var.project
  region  = module.policy.region
  status  = "UP"
}

module "policy" {
  source = "../modules/policy"

  cloud    = "google"
  platform = local.description
  given    = local.description
}

resource "google_project_service" "used" {
  for_each = toset(["artifactregistry", "billingbudgets", "compute", "container", "monitoring", "servicenetworking", "sqladmin", "storage"])

  project            = var.project
  service            = "${each.key}.googleapis.com"
  disable_on_destroy = false
}

# Network: nodes and databases have private addresses; Cloud NAT lets nodes out.

module "network" {
  source     = "git::https://github.com/terraform-google-modules/terraform-google-network.git?ref=3012d98fcb709d5ba456e0d93f42ab61028f7655" # v18.1.0
  depends_on = [google_project_service.used]

  project_id   = var.project
  network_name = local.name
  subnets = [{
    subnet_name           = "${local.name}-nodes"
    subnet_ip             = var.network
    subnet_region         = module.policy.region
    subnet_private_access = "true" # Google's own services without NAT
    subnet_flow_logs      = "true"
  }]
  secondary_ranges = {
    "${local.name}-nodes" = [
      { range_name = "pods", ip_cidr_range = "10.64.0.0/14" },
      { range_name = "services", ip_cidr_range = "10.68.0.0/20" },
    ]
  }
  # Cloud SQL lives in a network of Google's that is joined to this one.
  private_service_access_config = {
    enable_private_services_connection = true
    address_name                       = "${local.name}-databases"
    prefix_length                      = 20
  }
}

resource "google_compute_router" "nat" {
  name    = local.name
  region  = module.policy.region
  network = module.network.network_name
}

resource "google_compute_router_nat" "nat" {
  name                               = local.name
  region                             = module.policy.region
  router                             = google_compute_router.nat.name
  nat_ip_allocate_option             = "AUTO_ONLY"
  source_subnetwork_ip_ranges_to_nat = "ALL_SUBNETWORKS_ALL_IP_RANGES"

  log_config {
    enable = true
    filter = "ERRORS_ONLY"
  }
}

# Cluster.

module "gke" {
  source = "git::https://github.com/terraform-google-modules/terraform-google-kubernetes-engine.git//modules/private-cluster?ref=643218001f0575800d0f73ecccddd0ba4441000b" # v44.2.0

  project_id         = var.project
  name               = local.name
  region             = module.policy.region
  zones              = local.zones
  kubernetes_version = module.policy.kubernetes
  release_channel    = "REGULAR"

  network                 = module.network.network_name
  subnetwork              = module.network.subnets_names[0]
  ip_range_pods           = "pods"
  ip_range_services       = "services"
  enable_private_nodes    = true
  enable_private_endpoint = length(var.admin_cidrs) == 0
  master_ipv4_cidr_block  = "172.16.0.0/28"
  # Nor may anybody reach it by its name from outside.
  dns_allow_external_traffic = false
  master_authorized_networks = [
    for cidr in var.admin_cidrs : { cidr_block = cidr, display_name = "admins" }
  ]

  # Dataplane V2 applies network policies.
  datapath_provider        = "ADVANCED_DATAPATH"
  network_policy           = false
  security_posture_mode    = "BASIC"
  grant_registry_access    = true
  remove_default_node_pool = true
  deletion_protection      = var.deletion_protection
  cluster_resource_labels  = local.labels

  # Google's autoscaler takes the cheapest pool that can have a node, so spot where there is some.
  node_pools = concat(
    [{
      name              = "cpu"
      machine_type      = module.policy.cpu_pool.machine
      total_min_count   = module.policy.cpu_pool.min
      total_max_count   = module.policy.cpu_pool.max
      initial_count     = 1 # a zone
      spot              = false
      accelerator_count = 0
      accelerator_type  = ""

      gpu_driver_version = ""
      location_policy    = "BALANCED"
      disk_size_gb       = 100
      disk_type          = "pd-balanced"
    }],
    [for name, pool in module.policy.gpu_pools : {
      name              = name
      machine_type      = pool.machine
      total_min_count   = pool.min
      total_max_count   = pool.max
      initial_count     = 0
      spot              = pool.spot
      accelerator_count = pool.gpus
      accelerator_type  = pool.accelerator

      gpu_driver_version = "DEFAULT"
      location_policy    = "ANY" # wherever there are GPUs
      disk_size_gb       = 100   # images with CUDA take 5 GB each
      disk_type          = "pd-balanced"
    }],
  )
  node_pools_labels = merge(
    { all = {}, cpu = module.policy.cpu_pool.labels },
    { for name, pool in module.policy.gpu_pools : name => pool.labels },
  )
  node_pools_taints = merge(
    { all = [] },
    {
      for name, pool in module.policy.gpu_pools : name => [
        for taint in pool.taints : { key = taint.key, value = taint.value, effect = "NO_SCHEDULE" }
      ]
    },
  )
}

# Object stores: bundles, rollouts and inference logs; and what Kubeflow Pipelines keeps for itself.

module "buckets" {
  source   = "git::https://github.com/terraform-google-modules/terraform-google-cloud-storage.git//modules/simple_bucket?ref=18fe70b74a9696d3671d2fb379943424373b8c2b" # v12.3.0
  for_each = toset(concat(["store"], module.policy.pipelines ? ["pipelines"] : []))

  # Names of buckets are those of the whole world.
  name                     = "${local.name}-${each.key}-${data.google_project.me.number}"
  project_id               = var.project
  location                 = module.policy.region
  force_destroy            = !var.deletion_protection
  labels                   = local.labels
  versioning               = true
  bucket_policy_only       = true
  public_access_prevention = "enforced"
  lifecycle_rules = [
    {
      action    = { type = "Delete" }
      condition = { days_since_noncurrent_time = module.policy.retention.versions, with_state = "ARCHIVED" }
    },
    {
      action    = { type = "AbortIncompleteMultipartUpload" }
      condition = { age = 7 }
    },
  ]
}

# Databases: PostgreSQL for the ledger and MLflow, MySQL for Kubeflow Pipelines.

locals {
  database = {
    tier              = module.policy.database.machine
    availability_type = module.policy.database.standby ? "REGIONAL" : "ZONAL"
  }
  backups = {
    enabled                        = true
    start_time                     = "02:00"
    point_in_time_recovery_enabled = true
    transaction_log_retention_days = tostring(min(module.policy.database.backups - 1, 7)) # fewer than backups
    retained_backups               = module.policy.database.backups
    retention_unit                 = "COUNT"
  }
}

module "postgres" {
  source     = "git::https://github.com/terraform-google-modules/terraform-google-sql-db.git//modules/postgresql?ref=25cf7833281c13578940ee5fe270cc962ddd3982" # v28.1.1
  depends_on = [module.network]

  project_id           = var.project
  name                 = "${local.name}-postgres"
  random_instance_name = true # a name is not free again for a week
  database_version     = "POSTGRES_17"
  edition              = "ENTERPRISE"
  region               = module.policy.region
  tier                 = local.database.tier
  availability_type    = local.database.availability_type
  disk_size            = module.policy.database.disk
  db_name              = "driftmill"
  enable_default_user  = false
  deletion_protection  = var.deletion_protection
  user_labels          = local.labels

  ip_configuration = {
    ipv4_enabled    = false
    private_network = module.network.network_self_link
    ssl_mode        = "ENCRYPTED_ONLY"
  }
  backup_configuration = local.backups
  insights_config      = {}
  database_flags = [
    { name = "log_connections", value = "on" },
    { name = "log_disconnections", value = "on" },
    { name = "log_lock_waits", value = "on" },
  ]
}

module "mysql" {
  source     = "git::https://github.com/terraform-google-modules/terraform-google-sql-db.git//modules/mysql?ref=25cf7833281c13578940ee5fe270cc962ddd3982" # v28.1.1
  count      = module.policy.pipelines ? 1 : 0
  depends_on = [module.network]

  project_id           = var.project
  name                 = "${local.name}-mysql"
  random_instance_name = true
  database_version     = "MYSQL_8_4"
  edition              = "ENTERPRISE"
  region               = module.policy.region
  tier                 = local.database.tier
  availability_type    = local.database.availability_type
  disk_size            = module.policy.database.disk
  db_name              = "mlpipeline"
  enable_default_user  = false
  deletion_protection  = var.deletion_protection
  user_labels          = local.labels

  ip_configuration = {
    ipv4_enabled    = false
    private_network = module.network.network_self_link
    # Kubeflow Pipelines' servers speak to MySQL without TLS.
    ssl_mode = "ALLOW_UNENCRYPTED_AND_ENCRYPTED"
  }
  # MySQL's log of changes, which Google calls binary, brings it back to any moment.
  backup_configuration = merge({ for key, value in local.backups : key => value if key != "point_in_time_recovery_enabled" }, { binary_log_enabled = true })
}

resource "google_sql_user" "driftmill" {
  for_each = merge({ postgres = module.postgres.instance_name }, { for made in module.mysql : "mysql" => made.instance_name })

  project             = var.project
  instance            = each.value
  name                = "driftmill"
  password_wo         = var.database_password
  password_wo_version = var.database_password_version
}

# Registry.

resource "google_artifact_registry_repository" "images" {
  depends_on = [google_project_service.used]

  repository_id = local.name
  description   = "Images of Driftmill"
  location      = module.policy.region
  format        = "DOCKER"
  labels        = local.labels

  docker_config {
    immutable_tags = true
  }
  cleanup_policies {
    id     = "untagged"
    action = "DELETE"
    condition {
      tag_state  = "UNTAGGED"
      older_than = "${module.policy.retention.images * 86400}s"
    }
  }
}

# Rights of pods: Kubernetes' service accounts are principals of Google's themselves. No key, and no
# account of Google's in between.

locals {
  pool = "principal://iam.googleapis.com/projects/${data.google_project.me.number}/locations/global/workloadIdentityPools/${var.project}.svc.id.goog/subject"
  grants = merge([
    for role, buckets in { store = ["store"], runner = keys(module.buckets) } : merge([
      for account in module.policy.accounts[role] : {
        for bucket in buckets : "${account}:${bucket}" => { account = account, bucket = bucket }
      }
    ]...)
  ]...)
}

resource "google_storage_bucket_iam_member" "pods" {
  for_each   = local.grants
  depends_on = [module.gke] # the pool comes with the first cluster

  bucket = module.buckets[each.value.bucket].name
  role   = "roles/storage.objectUser"
  member = "${local.pool}/ns/${split(":", each.value.account)[0]}/sa/${split(":", each.value.account)[1]}"
}

# Kubeflow Pipelines 2.17 reaches Google's buckets by S3's interface alone, which wants a key. This
# account owns it and may use the one bucket; whoever wants none sets `pipelines: false`.
resource "google_service_account" "pipelines" {
  count = module.policy.pipelines ? 1 : 0

  account_id   = "${local.name}-pipelines"
  display_name = "Kubeflow Pipelines of ${local.name}"
}

resource "google_storage_bucket_iam_member" "pipelines" {
  for_each = module.policy.pipelines ? toset(["roles/storage.objectUser", "roles/storage.legacyBucketReader"]) : toset([])

  bucket = module.buckets["pipelines"].name
  role   = each.key
  member = "serviceAccount:${google_service_account.pipelines[0].email}"
}

# Budget: an e-mail when half, four fifths and all of it is spent, and when more is foreseen.

resource "google_monitoring_notification_channel" "budget" {
  for_each   = toset(module.policy.budget.emails)
  depends_on = [google_project_service.used]

  display_name = each.key
  type         = "email"
  labels       = { email_address = each.key }
}

resource "google_billing_budget" "monthly" {
  depends_on = [google_project_service.used]

  billing_account = var.billing_account
  display_name    = local.name

  budget_filter {
    projects        = ["projects/${data.google_project.me.number}"]
    calendar_period = "MONTH"
  }
  amount {
    specified_amount {
      currency_code = "USD"
      units         = tostring(module.policy.budget.monthly)
    }
  }

  dynamic "threshold_rules" {
    for_each = concat(
      [for share in module.policy.budget.spent : { basis = "CURRENT_SPEND", share = share }],
      [for share in module.policy.budget.foreseen : { basis = "FORECASTED_SPEND", share = share }],
    )
    content {
      threshold_percent = threshold_rules.value.share / 100
      spend_basis       = threshold_rules.value.basis
    }
  }
  all_updates_rule {
    monitoring_notification_channels = [for channel in google_monitoring_notification_channel.budget : channel.id]
    disable_default_iam_recipients   = true
  }
}
