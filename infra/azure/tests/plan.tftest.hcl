# The whole root, planned with providers that make everything up: no account, no credentials.

mock_provider "azurerm" {
  mock_data "azurerm_client_config" {
    defaults = { tenant_id = "00000000-0000-0000-0000-000000000001" }
  }
  # The modules look at what an id looks like.
  override_during = plan
  mock_resource "azurerm_resource_group" {
    defaults = { id = "/subscriptions/00000000-0000-0000-0000-000000000002/resourceGroups/made" }
  }
  mock_resource "azurerm_container_registry" {
    defaults = { id = "/subscriptions/00000000-0000-0000-0000-000000000002/resourceGroups/made/providers/Microsoft.ContainerRegistry/registries/made" }
  }
  mock_resource "azurerm_user_assigned_identity" {
    defaults = { id = "/subscriptions/00000000-0000-0000-0000-000000000002/resourceGroups/made/providers/Microsoft.ManagedIdentity/userAssignedIdentities/made" }
  }
}
mock_provider "azapi" {
  mock_data "azapi_client_config" {
    defaults = { subscription_id = "00000000-0000-0000-0000-000000000002" }
  }
}

variables {
  subscription      = "00000000-0000-0000-0000-000000000002"
  budget_start      = "2026-12-01"
  database_password = "aPasswordOfLettersAndDigits1"
}

run "small" {
  command = plan

  assert {
    condition     = toset(keys(azurerm_federated_identity_credential.store)) == toset(["driftmill:driftmill", "driftmill:driftmill-controller", "kubeflow:driftmill-runner"])
    error_message = "the service accounts that may take the identity"
  }

  assert {
    condition     = toset(keys(module.aks.agentpool_resource_ids)) == toset(["smallod", "smallsp"])
    error_message = "two pools of GPUs beside that of CPUs"
  }
}

run "large" {
  command = plan
  variables { platform = "../sizes/large.yaml" }

  assert {
    condition     = toset(keys(module.aks.agentpool_resource_ids)) == toset(["largeod", "largesp", "smallod", "smallsp"])
    error_message = "two kinds of GPUs, spot and on demand"
  }
}

run "a_budget_from_the_middle_of_a_month" {
  command = plan
  variables { budget_start = "2026-12-15" }
  expect_failures = [var.budget_start]
}
