# The whole root, planned with providers that make everything up: no account, no credentials.

mock_provider "google" {
  mock_data "google_compute_zones" {
    defaults = { names = ["europe-west4-a", "europe-west4-b", "europe-west4-c"] }
  }
  mock_data "google_project" {
    defaults = { number = "123456789012" }
  }
}
mock_provider "google-beta" {}

variables {
  project           = "a-project"
  billing_account   = "0A1B2C-3D4E5F-678901"
  database_password = "aPasswordOfLettersAndDigits1"
}

run "small" {
  command = apply

  assert {
    condition     = setsubtract(module.gke.node_pools_names, [""]) == toset(["cpu", "smallod", "smallsp"])
    error_message = "one pool of CPUs, two of GPUs"
  }
  assert {
    condition = toset(keys(google_storage_bucket_iam_member.pods)) == toset([
      "driftmill:driftmill:store", "driftmill:driftmill-controller:store",
      "kubeflow:driftmill-runner:store", "kubeflow:driftmill-runner:pipelines",
    ])
    error_message = "the service accounts that may use buckets"
  }
  assert {
    condition     = yamldecode(output.helm_values).store.uri == "gs://driftmill-store-123456789012/driftmill"
    error_message = "the chart's store is the bucket"
  }
}

run "large" {
  command = plan
  variables { platform = "../sizes/large.yaml" }

  assert {
    condition     = length(google_sql_user.driftmill) == 2
    error_message = "a user of each database"
  }
}

run "without_pipelines_no_key" {
  command = plan
  variables { platform = "tests/no-pipelines.yaml" }

  assert {
    condition     = length(google_service_account.pipelines) == 0 && length(module.mysql) == 0
    error_message = "what Kubeflow Pipelines alone needs is not made"
  }
}

run "a_password_that_a_url_would_not_take" {
  command = plan
  variables { database_password = "p@ssword/with:everything?in=it" }
  expect_failures = [var.database_password]
}
