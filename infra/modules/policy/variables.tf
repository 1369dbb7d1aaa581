variable "cloud" {
  description = "For which cloud: aws, google or azure."
  type        = string

  validation {
    condition     = contains(["aws", "google", "azure"], var.cloud)
    error_message = "cloud is \"${var.cloud}\"; it may be aws, google or azure."
  }
}

variable "platform" {
  description = "The description of the platform, as in ../../sizes/*.yaml."
  type = object({
    name       = optional(string, "driftmill") # of the cluster; first part of all other names
    regions    = map(string)                   # by cloud
    zones      = optional(number, 2)           # in how many zones of the region
    kubernetes = optional(string, "1.34")      # version

    # Machines without GPUs. `min` of them always run.
    cpu = object({
      vcpus = optional(number, 4) # of one machine
      min   = optional(number, 2)
      max   = number
    })

    # Machines with GPUs, by a name of yours. None of them runs until a step asks for it.
    gpus = optional(map(object({
      product    = string                # as in the node label nvidia.com/gpu.product
      per_node   = optional(number, 1)   # GPUs of one machine
      max        = number                # machines, spot and on demand together
      spot_share = optional(number, 0.5) # of them, the share that may be spot
    })), {})

    # PostgreSQL for ledger and MLflow; MySQL of the same size for Kubeflow Pipelines.
    database = optional(object({
      vcpus   = optional(number, 2)
      disk    = optional(number, 20)  # GiB
      standby = optional(bool, false) # a second one in another zone
    }), {})
    pipelines = optional(bool, true) # whether Kubeflow Pipelines will be installed
    mlflow    = optional(string, "") # URL of an MLflow server that is there; empty: none

    # Days.
    retention = optional(object({
      versions = optional(number, 30) # how long what was deleted or replaced can be had back
      backups  = optional(number, 14) # of the databases
      logs     = optional(number, 30) # of the control plane
      images   = optional(number, 30) # without a tag
    }), {})

    # An alarm, not a limit: clouds know no limit.
    budget = object({
      monthly = number # US dollars
      emails  = list(string)
    })
  })

  validation {
    condition     = can(regex("^[a-z][a-z0-9-]{1,18}[a-z0-9]$", var.platform.name))
    error_message = "name is \"${var.platform.name}\"; it has 3 to 20 characters, a-z, 0-9 and dashes, and starts with a letter."
  }
  validation {
    condition     = try(length(var.platform.regions[var.cloud]) > 0, false)
    error_message = "regions has no region for ${var.cloud}."
  }
  validation {
    condition     = var.platform.zones >= 2 && var.platform.zones <= 3 && floor(var.platform.zones) == var.platform.zones
    error_message = "zones is ${var.platform.zones}; it may be 2 or 3: control planes and databases want two at least."
  }
  validation {
    condition     = can(regex("^1\\.(3[0-6])$", var.platform.kubernetes))
    error_message = "kubernetes is \"${var.platform.kubernetes}\"; \"1.30\" to \"1.36\" are supported."
  }
  validation {
    condition     = contains(keys(local.machines.cpu.aws), tostring(var.platform.cpu.vcpus))
    error_message = "cpu.vcpus is ${var.platform.cpu.vcpus}; it may be ${join(", ", keys(local.machines.cpu.aws))}."
  }
  validation {
    condition     = var.platform.cpu.min >= 1 && var.platform.cpu.max >= var.platform.cpu.min
    error_message = "cpu.min is ${var.platform.cpu.min} and cpu.max ${var.platform.cpu.max}; at least one machine must run, and max must not be below min."
  }
  validation {
    # 12 characters are what AKS leaves for the name of a pool; "-od" and "sp" are added.
    condition     = alltrue([for name in keys(var.platform.gpus) : can(regex("^[a-z][a-z0-9]{0,8}$", name))])
    error_message = "gpus has the pools ${join(", ", keys(var.platform.gpus))}; a name has 1 to 9 characters, a-z and 0-9, and starts with a letter."
  }
  validation {
    condition = alltrue([
      for pool in values(var.platform.gpus) : try(local.machines.gpu[var.cloud][pool.product][tostring(pool.per_node)], null) != null
    ])
    error_message = "gpus asks for ${join(", ", [for p in values(var.platform.gpus) : "${p.per_node} ${p.product}"])}; ${var.cloud} has machines with ${try(local.offers[var.cloud], "none")}."
  }
  validation {
    condition     = alltrue([for pool in values(var.platform.gpus) : pool.max >= 1 && floor(pool.max) == pool.max])
    error_message = "gpus: max of each pool is a whole number, 1 at least; leave out a pool that is not wanted."
  }
  validation {
    condition     = alltrue([for pool in values(var.platform.gpus) : pool.spot_share >= 0 && pool.spot_share <= 1])
    error_message = "gpus: spot_share of each pool is between 0 (none) and 1 (all; then nothing stands in when the cloud has none left)."
  }
  validation {
    condition     = contains(keys(local.machines.database.aws), tostring(var.platform.database.vcpus))
    error_message = "database.vcpus is ${var.platform.database.vcpus}; it may be ${join(", ", keys(local.machines.database.aws))}."
  }
  validation {
    condition     = var.platform.database.disk >= 20 && var.platform.database.disk <= 4096
    error_message = "database.disk is ${var.platform.database.disk}; it may be 20 to 4096 GiB."
  }
  validation {
    # The three clouds' own limits.
    condition     = var.platform.retention.backups >= 7 && var.platform.retention.backups <= 35
    error_message = "retention.backups is ${var.platform.retention.backups}; it may be 7 to 35 days."
  }
  validation {
    condition     = contains([1, 3, 5, 7, 14, 30, 60, 90, 120, 150, 180, 365, 400, 545, 731, 1096], var.platform.retention.logs)
    error_message = "retention.logs is ${var.platform.retention.logs}; clouds keep logs for 1, 3, 5, 7, 14, 30, 60, 90, 120, 150, 180, 365, 400, 545, 731 or 1096 days."
  }
  validation {
    condition     = var.platform.retention.versions >= 1 && var.platform.retention.versions <= 365 && var.platform.retention.images >= 1
    error_message = "retention.versions is ${var.platform.retention.versions} and retention.images ${var.platform.retention.images}; versions may be 1 to 365 days, images 1 at least."
  }
  validation {
    condition     = var.platform.budget.monthly > 0 && length(var.platform.budget.emails) > 0 && alltrue([for e in var.platform.budget.emails : can(regex("^[^@ ]+@[^@ ]+$", e))])
    error_message = "budget wants an amount above 0 and at least one e-mail address that hears of it."
  }
}

variable "given" {
  description = "The same description as it was written: Terraform would drop a misspelt key without a word."
  type        = any

  validation {
    condition     = length(setsubtract(keys(var.given), keys(var.platform))) == 0
    error_message = "the description has unknown keys: ${join(", ", setsubtract(keys(var.given), keys(var.platform)))}."
  }
  validation {
    condition = length(flatten([
      for part in ["cpu", "database", "retention", "budget"] : tolist(setsubtract(keys(try(var.given[part], {})), keys(var.platform[part])))
    ])) == 0
    error_message = format("the description has unknown keys: %s.", join(", ", flatten([
      for part in ["cpu", "database", "retention", "budget"] : [
        for key in setsubtract(keys(try(var.given[part], {})), keys(var.platform[part])) : format("%s.%s", part, key)
      ]
    ])))
  }
  validation {
    condition = length(flatten([
      for name, pool in try(var.given.gpus, {}) : tolist(setsubtract(keys(pool), try(keys(var.platform.gpus[name]), [])))
    ])) == 0
    error_message = format("the description has unknown keys: %s.", join(", ", flatten([
      for name, pool in try(var.given.gpus, {}) : [
        for key in setsubtract(keys(pool), try(keys(var.platform.gpus[name]), [])) : format("gpus.%s.%s", name, key)
      ]
    ])))
  }
}
