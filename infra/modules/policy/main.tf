# What each root needs, from one description. No provider: `terraform test` runs this anywhere.

locals {
  machines = yamldecode(file("${path.module}/machines.yaml"))
  offers = {
    for cloud, products in local.machines.gpu :
    cloud => join(", ", flatten([for product, sizes in products : [for n in keys(sizes) : "${n} ${product}"]]))
  }

  # The keys by which the pipeline compiler (pipelines/pods.py) finds and tolerates nodes;
  # tests/infra holds both together.
  gpu_product = "nvidia.com/gpu.product"
  gpu_taint   = "nvidia.com/gpu"
  # AWS has no taint of its own for spot.
  spot_taint = {
    aws    = { key = "driftmill/spot", value = "true" }
    google = { key = "cloud.google.com/gke-spot", value = "true" }
    azure  = { key = "kubernetes.azure.com/scalesetpriority", value = "spot" }
  }[var.cloud]

  # Two pools of each: spot, and on demand for when the cloud has no spot left. Together they have
  # no more than `max` machines.
  kinds = flatten([
    for name, pool in var.platform.gpus : [
      { pool = name, name = "${name}sp", spot = true, max = floor(pool.max * pool.spot_share) },
      { pool = name, name = "${name}od", spot = false, max = pool.max - floor(pool.max * pool.spot_share) },
    ]
  ])
  gpu_pools = {
    for kind in local.kinds : kind.name => {
      spot        = kind.spot
      machine     = local.machines.gpu[var.cloud][var.platform.gpus[kind.pool].product][tostring(var.platform.gpus[kind.pool].per_node)]
      gpus        = var.platform.gpus[kind.pool].per_node
      accelerator = try(local.machines.accelerators[var.platform.gpus[kind.pool].product], null)
      min         = 0
      max         = kind.max
      labels = {
        (local.gpu_product)      = var.platform.gpus[kind.pool].product
        "nvidia.com/gpu.present" = "true"
        "driftmill/pool"         = kind.pool
      }
      taints = concat(
        [{ key = local.gpu_taint, value = "present", effect = "NoSchedule" }],
        kind.spot ? [{ key = local.spot_taint.key, value = local.spot_taint.value, effect = "NoSchedule" }] : []
      )
    } if kind.max > 0
  }
}
