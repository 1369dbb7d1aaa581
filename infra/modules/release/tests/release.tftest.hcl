variables {
  folder   = "infra/somewhere"
  connect  = "connect-to-the-cluster"
  login    = "log-into-the-registry"
  registry = "registry.example/driftmill"
  store    = { uri = "s3://models/driftmill", region = "eu-central-1" }
  ledger   = { host = "db.example", user = "driftmill", password = "print-password" }
}

run "a_bucket" {
  command = plan
  assert {
    condition     = yamldecode(output.helm_values).store == { type = "s3", uri = "s3://models/driftmill", region = "eu-central-1" }
    error_message = "got ${output.helm_values}"
  }
  assert {
    condition     = output.overlay == "" && !strcontains(output.commands, "k8s/overlays/mine")
    error_message = "without Kubeflow Pipelines there is no overlay"
  }
  assert {
    condition     = !strcontains(output.helm_values, "networkPolicy")
    error_message = "the nodes' own addresses stay shut"
  }
}

run "a_volume" {
  command = plan
  variables { store = { storage_class = "files", size = "20Gi" } }
  assert {
    condition     = yamldecode(output.helm_values).store == { type = "pvc", pvc = { storageClass = "files", size = "20Gi" } }
    error_message = "got ${output.helm_values}"
  }
}

run "rights_by_annotation" {
  command = plan
  variables {
    annotations = { store = { role = "a" }, runner = { role = "b" } }
    pipelines   = { mysql = "my.example", user = "u", password = "print", host = "s3.example", region = "eu-central-1", bucket = "pipes", keys = false }
  }
  assert {
    condition     = yamldecode(output.helm_values).serviceAccount == { name = "driftmill", annotations = { role = "a" } }
    error_message = "the chart's account"
  }
  assert {
    condition     = [for patch in yamldecode(output.overlay).patches : patch.target.name if patch.target.kind == "ServiceAccount"] == ["driftmill-runner$"]
    error_message = "only accounts with annotations are patched"
  }
  assert {
    condition     = strcontains(output.overlay, "useSDKCreds: true") && !strcontains(output.overlay, "mlpipeline-minio-artifact")
    error_message = "no Secret with keys is named"
  }
}

run "rights_by_metadata_server" {
  command = plan
  variables {
    metadata_server = true
    keys            = "make-keys"
    pipelines       = { mysql = "my.example", user = "u", password = "print", host = "s3.example", region = "auto", bucket = "pipes", keys = true }
  }
  assert {
    condition     = yamldecode(output.helm_values).networkPolicy.egress[1].to[0].ipBlock.cidr == "169.254.169.252/30"
    error_message = "pods reach the metadata server"
  }
  assert {
    condition     = contains([for patch in yamldecode(output.overlay).patches : patch.target.name], "runs")
    error_message = "so do runs"
  }
  assert {
    condition     = strcontains(output.commands, "make-keys") && strcontains(output.overlay, "secretName: mlpipeline-minio-artifact")
    error_message = "the Secret with keys is made, and named"
  }
}

run "neither_bucket_nor_volume" {
  command = plan
  variables { store = { region = "eu-central-1" } }
  expect_failures = [var.store]
}
