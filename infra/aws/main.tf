# Driftmill on AWS: EKS, S3, RDS, ECR. ../README.md says how to use it.
#
# Modules are pinned by commit, for tags can be moved; the version stands behind it.

locals {
  description = yamldecode(file(var.platform))
  name        = module.policy.name
  zones       = slice(data.aws_availability_zones.here.names, 0, module.policy.zones)
  oidc = {
    provider_arn = module.eks.oidc_provider_arn
  }
}

data "aws_availability_zones" "here" {
  #checkov:skip=CKV_AWS_394:only the first names are used, and a new zone gets a later letter
  # Local zones have neither EKS nor RDS.
  filter {
    name   = "opt-in-status"
    values = ["opt-in-not-required"]
  }
}

data "aws_caller_identity" "me" {}

module "policy" {
  source = "../modules/policy"

  cloud    = "aws"
  platform = local.description
  given    = local.description
}

# Network: nodes and databases have private addresses; one NAT gateway lets nodes out, and S3 is
# reached without it.

module "vpc" {
  source = "git::https://github.com/terraform-aws-modules/terraform-aws-vpc.git?ref=82d1929e669efef4e2ad00611b8a68e7a56e049c" # v6.6.0

  name             = local.name
  cidr             = var.network
  azs              = local.zones
  private_subnets  = [for i in range(module.policy.zones) : cidrsubnet(var.network, 4, i)]
  database_subnets = [for i in range(module.policy.zones) : cidrsubnet(var.network, 8, 64 + i)]
  public_subnets   = [for i in range(module.policy.zones) : cidrsubnet(var.network, 8, 80 + i)]

  enable_nat_gateway      = true
  single_nat_gateway      = true
  map_public_ip_on_launch = false
  private_subnet_tags     = { "kubernetes.io/role/internal-elb" = "1" }

  enable_flow_log                                 = true
  create_flow_log_cloudwatch_log_group            = true
  create_flow_log_cloudwatch_iam_role             = true
  flow_log_cloudwatch_log_group_retention_in_days = module.policy.retention.logs
}

module "endpoints" {
  source = "git::https://github.com/terraform-aws-modules/terraform-aws-vpc.git//modules/vpc-endpoints?ref=82d1929e669efef4e2ad00611b8a68e7a56e049c" # v6.6.0

  vpc_id = module.vpc.vpc_id
  endpoints = {
    s3 = {
      service         = "s3"
      service_type    = "Gateway"
      route_table_ids = module.vpc.private_route_table_ids
    }
  }
}

# Cluster.

module "eks" {
  source = "git::https://github.com/terraform-aws-modules/terraform-aws-eks.git?ref=bef29c4d9523523e57fe898643fde2895106b339" # v21.19.0

  name               = local.name
  kubernetes_version = module.policy.kubernetes
  vpc_id             = module.vpc.vpc_id
  subnet_ids         = module.vpc.private_subnets

  endpoint_private_access      = true
  endpoint_public_access       = length(var.admin_cidrs) > 0
  endpoint_public_access_cidrs = var.admin_cidrs
  deletion_protection          = var.deletion_protection

  enable_irsa                            = true
  cloudwatch_log_group_retention_in_days = module.policy.retention.logs
  enabled_log_types                      = ["api", "audit", "authenticator"]

  access_entries = {
    for arn in var.admins : arn => {
      principal_arn = arn
      policy_associations = {
        admin = {
          policy_arn   = "arn:aws:eks::aws:cluster-access-policy/AmazonEKSClusterAdminPolicy"
          access_scope = { type = "cluster" }
        }
      }
    }
  }

  addons = {
    coredns    = {}
    kube-proxy = {}
    vpc-cni = {
      before_compute       = true
      configuration_values = jsonencode({ enableNetworkPolicy = "true" })
    }
    aws-ebs-csi-driver = { service_account_role_arn = module.ebs_role.arn }
  }

  eks_managed_node_groups = merge(
    {
      cpu = {
        instance_types        = [module.policy.cpu_pool.machine]
        ami_type              = "AL2023_x86_64_STANDARD"
        min_size              = module.policy.cpu_pool.min
        max_size              = module.policy.cpu_pool.max
        desired_size          = module.policy.cpu_pool.min
        labels                = module.policy.cpu_pool.labels
        taints                = {}
        block_device_mappings = local.disk
      }
    },
    {
      for name, pool in module.policy.gpu_pools : name => {
        instance_types = [pool.machine]
        ami_type       = "AL2023_x86_64_NVIDIA"
        capacity_type  = pool.spot ? "SPOT" : "ON_DEMAND"
        min_size       = pool.min
        max_size       = pool.max
        desired_size   = pool.min
        labels         = pool.labels
        taints = {
          for taint in pool.taints : taint.key => { key = taint.key, value = taint.value, effect = "NO_SCHEDULE" }
        }
        block_device_mappings = local.disk
      }
    },
  )
}

locals {
  # Images with CUDA take 5 GB each.
  disk = {
    root = {
      device_name = "/dev/xvda"
      ebs         = { volume_size = 100, volume_type = "gp3", encrypted = true, delete_on_termination = true }
    }
  }
}

# Object stores: bundles, rollouts and inference logs; and what Kubeflow Pipelines keeps for itself.

module "buckets" {
  source   = "git::https://github.com/terraform-aws-modules/terraform-aws-s3-bucket.git?ref=dd0c434de5e74d8864e249ee020d917b076b6e32" # v5.15.4
  for_each = toset(concat(["store"], module.policy.pipelines ? ["pipelines"] : []))

  # Names of buckets are those of the whole world.
  bucket        = "${local.name}-${each.key}-${data.aws_caller_identity.me.account_id}"
  force_destroy = !var.deletion_protection

  versioning                            = { enabled = true }
  attach_deny_insecure_transport_policy = true
  server_side_encryption_configuration = {
    rule = { apply_server_side_encryption_by_default = { sse_algorithm = "AES256" } }
  }
  lifecycle_rule = [{
    id                                     = "old-versions"
    enabled                                = true
    abort_incomplete_multipart_upload_days = 7
    noncurrent_version_expiration          = { days = module.policy.retention.versions }
    expiration                             = { expired_object_delete_marker = true }
  }]
}

# Databases: PostgreSQL for the ledger and MLflow, MySQL for Kubeflow Pipelines. RDS makes the
# passwords, changes them, and keeps them in Secrets Manager.

locals {
  databases = merge(
    { postgres = { engine = "postgres", version = "17", family = "postgres17", port = 5432, name = "driftmill" } },
    module.policy.pipelines ? { mysql = { engine = "mysql", version = "8.4", family = "mysql8.4", port = 3306, name = "mlpipeline" } } : {},
  )
}

resource "aws_security_group" "database" {
  #checkov:skip=CKV2_AWS_5:module.databases attaches it
  for_each = local.databases

  name        = "${local.name}-${each.key}"
  description = "Nodes may reach the database"
  vpc_id      = module.vpc.vpc_id
}

resource "aws_vpc_security_group_ingress_rule" "database" {
  for_each = local.databases

  security_group_id            = aws_security_group.database[each.key].id
  referenced_security_group_id = module.eks.node_security_group_id
  description                  = "Pods"
  ip_protocol                  = "tcp"
  from_port                    = each.value.port
  to_port                      = each.value.port
}

module "databases" {
  source   = "git::https://github.com/terraform-aws-modules/terraform-aws-rds.git?ref=bc8c1e240a98fd54a12c61c70de91cbabec71863" # v7.2.0
  for_each = local.databases

  identifier           = "${local.name}-${each.key}"
  engine               = each.value.engine
  engine_version       = each.value.version
  major_engine_version = each.value.version
  family               = each.value.family
  instance_class       = module.policy.database.machine
  multi_az             = module.policy.database.standby

  allocated_storage     = module.policy.database.disk
  max_allocated_storage = module.policy.database.disk * 4
  storage_type          = "gp3"
  storage_encrypted     = true

  db_name                     = each.value.name
  username                    = "driftmill"
  port                        = each.value.port
  manage_master_user_password = true

  publicly_accessible    = false
  create_db_subnet_group = false
  db_subnet_group_name   = module.vpc.database_subnet_group_name
  vpc_security_group_ids = [aws_security_group.database[each.key].id]

  backup_retention_period         = module.policy.database.backups
  copy_tags_to_snapshot           = true
  deletion_protection             = var.deletion_protection
  skip_final_snapshot             = !var.deletion_protection
  auto_minor_version_upgrade      = true
  performance_insights_enabled    = true
  enabled_cloudwatch_logs_exports = each.value.engine == "postgres" ? ["postgresql", "upgrade"] : ["error"]
  # Kubeflow Pipelines' servers speak to MySQL without TLS.
  parameters = each.value.engine == "postgres" ? [{ name = "rds.force_ssl", value = "1" }] : [{ name = "require_secure_transport", value = "0" }]
}

# Registry.

module "registry" {
  source   = "git::https://github.com/terraform-aws-modules/terraform-aws-ecr.git?ref=b6ef04d088cf91d5ba9505132e9ff7c9f847ed5d" # v3.2.0
  for_each = toset(module.policy.images)

  repository_name                 = "${local.name}/${each.key}"
  repository_image_tag_mutability = "IMMUTABLE"
  repository_image_scan_on_push   = true
  repository_force_delete         = !var.deletion_protection
  repository_lifecycle_policy = jsonencode({
    rules = [{
      rulePriority = 1
      description  = "Images without a tag"
      selection    = { tagStatus = "untagged", countType = "sinceImagePushed", countUnit = "days", countNumber = module.policy.retention.images }
      action       = { type = "expire" }
    }]
  })
}

# Rights of pods: roles that only the named service accounts may take, by the cluster's own identity
# provider. No key is made anywhere.

locals {
  objects = ["s3:GetObject", "s3:PutObject", "s3:DeleteObject", "s3:AbortMultipartUpload", "s3:ListMultipartUploadParts"]
  # What a role may do in a bucket, by the bucket.
  rights = {
    for bucket, made in module.buckets : bucket => {
      "${bucket}Objects" = { actions = local.objects, resources = ["${made.s3_bucket_arn}/*"] }
      "${bucket}Bucket"  = { actions = ["s3:ListBucket", "s3:GetBucketLocation", "s3:ListBucketMultipartUploads"], resources = [made.s3_bucket_arn] }
    }
  }
  roles = merge(
    { store = ["store"], runner = keys(module.buckets) },
    module.policy.pipelines ? { pipelines = ["pipelines"] } : {},
  )
}

module "roles" {
  source   = "git::https://github.com/terraform-aws-modules/terraform-aws-iam.git//modules/iam-role-for-service-accounts?ref=981121bcd17618b8ed032223c0d9e647b9277ef9" # v6.5.0
  for_each = local.roles

  name            = "${local.name}-${each.key}"
  use_name_prefix = false
  policy_name     = "${local.name}-${each.key}"
  oidc_providers = {
    cluster = merge(local.oidc, { namespace_service_accounts = module.policy.accounts[each.key] })
  }
  permissions = merge([for bucket in each.value : local.rights[bucket]]...)
}

module "autoscaler_role" {
  source = "git::https://github.com/terraform-aws-modules/terraform-aws-iam.git//modules/iam-role-for-service-accounts?ref=981121bcd17618b8ed032223c0d9e647b9277ef9" # v6.5.0

  name                             = "${local.name}-autoscaler"
  use_name_prefix                  = false
  attach_cluster_autoscaler_policy = true
  cluster_autoscaler_cluster_names = [module.eks.cluster_name]
  oidc_providers = {
    cluster = merge(local.oidc, { namespace_service_accounts = ["kube-system:cluster-autoscaler"] })
  }
}

module "ebs_role" {
  source = "git::https://github.com/terraform-aws-modules/terraform-aws-iam.git//modules/iam-role-for-service-accounts?ref=981121bcd17618b8ed032223c0d9e647b9277ef9" # v6.5.0

  name                  = "${local.name}-ebs"
  use_name_prefix       = false
  attach_ebs_csi_policy = true
  oidc_providers = {
    cluster = merge(local.oidc, { namespace_service_accounts = ["kube-system:ebs-csi-controller-sa"] })
  }
}

# Budget: an e-mail when half, four fifths and all of it is spent, and when more is foreseen.

resource "aws_budgets_budget" "monthly" {
  name         = local.name
  budget_type  = "COST"
  limit_amount = tostring(module.policy.budget.monthly)
  limit_unit   = "USD"
  time_unit    = "MONTHLY"

  cost_filter {
    name   = "TagKeyValue"
    values = ["user:project$${local.name}"]
  }

  dynamic "notification" {
    for_each = concat(
      [for share in module.policy.budget.spent : { type = "ACTUAL", share = share }],
      [for share in module.policy.budget.foreseen : { type = "FORECASTED", share = share }],
    )
    content {
      comparison_operator        = "GREATER_THAN"
      threshold                  = notification.value.share
      threshold_type             = "PERCENTAGE"
      notification_type          = notification.value.type
      subscriber_email_addresses = module.policy.budget.emails
    }
  }
}
