variables {
  cloud    = "google"
  platform = yamldecode(file("../../sizes/small.yaml"))
  given    = {}
}

run "spot_and_on_demand_share_the_maximum" {
  command = plan
  assert {
    condition     = { for name, pool in output.gpu_pools : name => pool.max } == { smallsp = 1, smallod = 1 }
    error_message = "two machines, half of them spot: one and one"
  }
  assert {
    condition     = alltrue([for pool in output.gpu_pools : pool.min == 0])
    error_message = "no machine with GPUs runs unasked"
  }
}

run "a_share_of_one_is_spot_only" {
  command = plan
  variables {
    platform = merge(yamldecode(file("../../sizes/small.yaml")), { gpus = { a = { product = "NVIDIA-L4", max = 3, spot_share = 1 } } })
  }
  assert {
    condition     = { for name, pool in output.gpu_pools : name => pool.max } == { asp = 3 }
    error_message = "all three are spot"
  }
}

run "a_share_of_nothing_is_on_demand_only" {
  command = plan
  variables {
    platform = merge(yamldecode(file("../../sizes/small.yaml")), { gpus = { a = { product = "NVIDIA-L4", max = 3, spot_share = 0 } } })
  }
  assert {
    condition     = { for name, pool in output.gpu_pools : name => pool.max } == { aod = 3 }
    error_message = "none is spot"
  }
}

run "part_of_a_machine_is_on_demand" {
  command = plan
  variables {
    platform = merge(yamldecode(file("../../sizes/small.yaml")), { gpus = { a = { product = "NVIDIA-L4", max = 1, spot_share = 0.9 } } })
  }
  assert {
    condition     = keys(output.gpu_pools) == ["aod"]
    error_message = "the only machine must be one that can be had"
  }
}

run "spot_machines_keep_out_what_cannot_be_interrupted" {
  command = plan
  assert {
    condition     = [for t in output.gpu_pools.smallsp.taints : t.key] == ["nvidia.com/gpu", "cloud.google.com/gke-spot"]
    error_message = "spot: both taints"
  }
  assert {
    condition     = [for t in output.gpu_pools.smallod.taints : t.key] == ["nvidia.com/gpu"]
    error_message = "on demand: that of GPUs alone"
  }
  assert {
    condition     = output.gpu_pools.smallsp.labels["nvidia.com/gpu.product"] == "Tesla-T4"
    error_message = "the label that contracts ask for"
  }
}

run "the_autoscaler_tries_spot_first" {
  command = plan
  assert {
    condition     = yamldecode(output.expander) == { "50" = [".*smallsp.*"], "10" = [".*"] }
    error_message = "got ${output.expander}"
  }
}

run "machines_of_aws" {
  command = plan
  variables { cloud = "aws" }
  assert {
    condition     = output.gpu_pools.smallod.machine == "g4dn.xlarge" && output.cpu_pool.machine == "m7i.xlarge" && output.region == "eu-central-1"
    error_message = "a T4 on AWS is a g4dn"
  }
}

run "machines_of_azure" {
  command = plan
  variables { cloud = "azure" }
  assert {
    condition     = output.gpu_pools.smallod.machine == "Standard_NC4as_T4_v3" && output.gpu_pools.smallsp.taints[1].key == "kubernetes.azure.com/scalesetpriority"
    error_message = "a T4 on Azure is an NCasT4_v3, and spot has Azure's taint"
  }
}

run "the_smallest_description" {
  command = plan
  variables {
    platform = { regions = { google = "europe-west4" }, cpu = { max = 2 }, budget = { monthly = 100, emails = ["a@b.example"] } }
    given    = { regions = { google = "europe-west4" }, cpu = { max = 2 }, budget = { monthly = 100, emails = ["a@b.example"] } }
  }
  assert {
    condition     = length(output.gpu_pools) == 0 && output.cpu_pool.min == 2 && output.retention.versions == 30
    error_message = "everything else has a default"
  }
  assert {
    condition     = output.budget.monthly == 100 && output.database.backups == 14
    error_message = "what was given is passed on"
  }
}
