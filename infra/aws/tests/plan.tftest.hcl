# The whole root, planned with a provider that makes everything up: no account, no credentials.

mock_provider "aws" {
  mock_data "aws_availability_zones" {
    defaults = { names = ["eu-central-1a", "eu-central-1b", "eu-central-1c"] }
  }
  mock_data "aws_caller_identity" {
    defaults = { account_id = "123456789012", arn = "arn:aws:iam::123456789012:role/admin" }
  }
  mock_data "aws_partition" {
    defaults = { partition = "aws", dns_suffix = "amazonaws.com" }
  }
  mock_data "aws_iam_policy_document" {
    defaults = { json = "{}" }
  }
  mock_data "aws_iam_session_context" {
    defaults = { issuer_arn = "arn:aws:iam::123456789012:role/admin" }
  }
  mock_resource "aws_iam_role" {
    defaults = { arn = "arn:aws:iam::123456789012:role/made" }
  }
  mock_resource "aws_iam_policy" {
    defaults = { arn = "arn:aws:iam::123456789012:policy/made" }
  }
  mock_resource "aws_s3_bucket" {
    defaults = { arn = "arn:aws:s3:::made" }
  }
  mock_resource "aws_eks_cluster" {
    defaults = {
      certificate_authority = [{ data = "bWFkZQ==" }]
      identity              = [{ oidc = [{ issuer = "https://oidc.example/id/made" }] }]
    }
  }
  mock_resource "aws_db_instance" {
    defaults = { master_user_secret = [{ secret_arn = "arn:aws:secretsmanager:eu-central-1:123456789012:secret:made" }] }
  }
}
# It would ask the cluster.
override_data {
  target = module.eks.data.tls_certificate.this[0]
  values = { certificates = [{ sha1_fingerprint = "9e99a48a9960b14926bb7f3b02e22da2b0ab7280" }] }
}

run "small" {
  command = apply

  assert {
    condition     = keys(module.eks.eks_managed_node_groups) == ["cpu", "smallod", "smallsp"]
    error_message = "one pool of CPUs, two of GPUs"
  }
  assert {
    condition     = alltrue([for name in ["smallod", "smallsp"] : module.eks.eks_managed_node_groups[name].node_group_labels["nvidia.com/gpu.product"] == "Tesla-T4"])
    error_message = "GPU nodes bear the label that contracts ask for"
  }
  assert {
    condition     = toset([for taint in module.eks.eks_managed_node_groups.smallsp.node_group_taints : taint.key]) == toset(["nvidia.com/gpu", "driftmill/spot"])
    error_message = "spot nodes bear both taints"
  }
  assert {
    condition     = keys(module.databases) == ["mysql", "postgres"]
    error_message = "one database for the ledger, one for Kubeflow Pipelines"
  }
  assert {
    condition     = yamldecode(output.helm_values).store.type == "s3"
    error_message = "the chart's store is the bucket"
  }
}

run "large" {
  command = plan
  variables { platform = "../sizes/large.yaml" }

  assert {
    condition     = length(module.eks.eks_managed_node_groups) == 5
    error_message = "two kinds of GPUs, spot and on demand"
  }
}

run "the_whole_internet_is_no_network" {
  command = plan
  variables { admin_cidrs = ["0.0.0.0/0"] }
  expect_failures = [var.admin_cidrs]
}
