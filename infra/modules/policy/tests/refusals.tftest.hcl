# What a description may not say. Each message names the key and what it may be.

variables {
  cloud    = "google"
  platform = yamldecode(file("../../sizes/small.yaml"))
  given    = yamldecode(file("../../sizes/small.yaml"))
}

run "an_unknown_cloud" {
  command = plan
  variables {
    cloud = "ibm"
  }
  expect_failures = [var.cloud]
}

run "a_name_too_long" {
  command = plan
  variables {
    platform = merge(yamldecode(file("../../sizes/small.yaml")), { name = "a-name-that-no-cloud-takes" })
  }
  expect_failures = [var.platform]
}

run "no_region" {
  command = plan
  variables {
    platform = merge(yamldecode(file("../../sizes/small.yaml")), { regions = { aws = "eu-central-1" } })
  }
  expect_failures = [var.platform]
}

run "one_zone" {
  command = plan
  variables {
    platform = merge(yamldecode(file("../../sizes/small.yaml")), { zones = 1 })
  }
  expect_failures = [var.platform]
}

run "an_old_kubernetes" {
  command = plan
  variables {
    platform = merge(yamldecode(file("../../sizes/small.yaml")), { kubernetes = "1.28" })
  }
  expect_failures = [var.platform]
}

run "a_machine_of_three_cpus" {
  command = plan
  variables {
    platform = merge(yamldecode(file("../../sizes/small.yaml")), { cpu = { vcpus = 3, max = 4 } })
  }
  expect_failures = [var.platform]
}

run "more_at_least_than_at_most" {
  command = plan
  variables {
    platform = merge(yamldecode(file("../../sizes/small.yaml")), { cpu = { min = 4, max = 2 } })
  }
  expect_failures = [var.platform]
}

run "no_machine_at_all" {
  command = plan
  variables {
    platform = merge(yamldecode(file("../../sizes/small.yaml")), { cpu = { min = 0, max = 2 } })
  }
  expect_failures = [var.platform]
}

run "a_pool_name_that_aks_refuses" {
  command = plan
  variables {
    platform = merge(yamldecode(file("../../sizes/small.yaml")), { gpus = { "too-long-for-aks" = { product = "Tesla-T4", max = 1 } } })
  }
  expect_failures = [var.platform]
}

run "a_product_that_the_cloud_has_not" {
  command = plan
  variables {
    platform = merge(yamldecode(file("../../sizes/small.yaml")), { gpus = { a = { product = "NVIDIA-H100-NVL", max = 1 } } })
  }
  expect_failures = [var.platform]
}

run "a_number_of_gpus_that_no_machine_has" {
  command = plan
  variables {
    platform = merge(yamldecode(file("../../sizes/small.yaml")), { gpus = { a = { product = "Tesla-T4", per_node = 3, max = 1 } } })
  }
  expect_failures = [var.platform]
}

run "half_a_machine" {
  command = plan
  variables {
    platform = merge(yamldecode(file("../../sizes/small.yaml")), { gpus = { a = { product = "Tesla-T4", max = 1.5 } } })
  }
  expect_failures = [var.platform]
}

run "more_spot_than_machines" {
  command = plan
  variables {
    platform = merge(yamldecode(file("../../sizes/small.yaml")), { gpus = { a = { product = "Tesla-T4", max = 1, spot_share = 2 } } })
  }
  expect_failures = [var.platform]
}

run "a_database_of_three_cpus" {
  command = plan
  variables {
    platform = merge(yamldecode(file("../../sizes/small.yaml")), { database = { vcpus = 3 } })
  }
  expect_failures = [var.platform]
}

run "a_tiny_disk" {
  command = plan
  variables {
    platform = merge(yamldecode(file("../../sizes/small.yaml")), { database = { disk = 5 } })
  }
  expect_failures = [var.platform]
}

run "backups_for_a_day" {
  command = plan
  variables {
    platform = merge(yamldecode(file("../../sizes/small.yaml")), { retention = { backups = 1 } })
  }
  expect_failures = [var.platform]
}

run "logs_for_two_days" {
  command = plan
  variables {
    platform = merge(yamldecode(file("../../sizes/small.yaml")), { retention = { logs = 2 } })
  }
  expect_failures = [var.platform]
}

run "versions_for_ever" {
  command = plan
  variables {
    platform = merge(yamldecode(file("../../sizes/small.yaml")), { retention = { versions = 3650 } })
  }
  expect_failures = [var.platform]
}

run "nobody_hears_of_the_budget" {
  command = plan
  variables {
    platform = merge(yamldecode(file("../../sizes/small.yaml")), { budget = { monthly = 100, emails = [] } })
  }
  expect_failures = [var.platform]
}

run "no_budget" {
  command = plan
  variables {
    platform = merge(yamldecode(file("../../sizes/small.yaml")), { budget = { monthly = 0, emails = ["a@b.example"] } })
  }
  expect_failures = [var.platform]
}

run "a_misspelt_key" {
  command = plan
  variables {
    given = merge(yamldecode(file("../../sizes/small.yaml")), { budjet = 5 })
  }
  expect_failures = [var.given]
}

run "a_misspelt_key_of_a_part" {
  command = plan
  variables {
    given = merge(yamldecode(file("../../sizes/small.yaml")), { retention = { version = 3 } })
  }
  expect_failures = [var.given]
}

run "a_misspelt_key_of_a_pool" {
  command = plan
  variables {
    given = merge(yamldecode(file("../../sizes/small.yaml")), { gpus = { small = { produkt = "Tesla-T4", max = 1 } } })
  }
  expect_failures = [var.given]
}
