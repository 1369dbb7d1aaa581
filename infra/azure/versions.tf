terraform {
  # 1.12: the modules' checks of what is null need it.
  required_version = ">= 1.12"

  required_providers {
    azurerm = {
      source  = "hashicorp/azurerm"
      version = "~> 4.81"
    }
    azapi = {
      source  = "Azure/azapi"
      version = "~> 2.12"
    }
  }

  # State holds no password, yet the names of everything: keep it in a private container, as by
  # `terraform init -backend-config=backend.hcl`.
  backend "azurerm" {
    use_azuread_auth = true
  }
}

provider "azurerm" {
  subscription_id     = var.subscription
  storage_use_azuread = true
  features {}
}

provider "azapi" {
  subscription_id = var.subscription
}
