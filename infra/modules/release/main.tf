# What a root makes, put into words for Kubernetes: the chart's values, the overlay of Kubeflow
# Pipelines, and the lines to run. No provider: this can be tried anywhere.

locals {
  # All that the chart opens by default (driftmill/values.py, NetworkPolicy.egress), and the server
  # that gives out a pod's rights: 80 is asked, 988 answers behind Dataplane V2.
  egress = [
    { to = [{ namespaceSelector = {} }, { ipBlock = { cidr = "0.0.0.0/0", except = ["169.254.0.0/16"] } }] },
    {
      to    = [{ ipBlock = { cidr = "169.254.169.252/30" } }]
      ports = [{ port = 80, protocol = "TCP" }, { port = 988, protocol = "TCP" }]
    },
  ]

  volume = var.store.uri == ""
  # Every part that has something to say.
  values = { for key, value in {
    store = { for key, value in {
      type   = local.volume ? "pvc" : "s3"
      uri    = local.volume ? null : var.store.uri
      region = local.volume ? null : var.store.region
      pvc    = local.volume ? { storageClass = var.store.storage_class, size = var.store.size } : null
    } : key => value if value != null }
    serviceAccount = { name = "driftmill", annotations = var.annotations.store }
    controller = {
      ledger         = { type = "postgres", existingSecret = "driftmill-ledger" }
      serviceAccount = { name = "driftmill-controller", annotations = var.annotations.store }
    }
    tracking      = var.mlflow != "" ? { uri = var.mlflow } : null
    networkPolicy = var.metadata_server ? { egress = local.egress } : null
    extraObjects  = length(var.extra_objects) > 0 ? var.extra_objects : null
  } : key => value if value != null }

  # A service account of Kubeflow Pipelines' by its name, with the annotations that it gets.
  annotated = var.pipelines == null ? {} : {
    for name, annotations in {
      driftmill-runner = var.annotations.runner
      ml-pipeline      = var.annotations.pipelines
      ml-pipeline-ui   = var.annotations.pipelines
    } : name => annotations if length(annotations) > 0
  }
}
