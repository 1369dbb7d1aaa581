terraform {
  required_version = ">= 1.11"

  required_providers {
    google = {
      source  = "hashicorp/google"
      version = "~> 7.22"
    }
    google-beta = {
      source  = "hashicorp/google-beta"
      version = "~> 7.22"
    }
  }

  # State holds no password, yet the names of everything: keep it in a private bucket, as by
  # `terraform init -backend-config=backend.hcl`.
  backend "gcs" {}
}

provider "google" {
  project = var.project
  region  = module.policy.region
  # Budgets are asked for in the name of a project.
  billing_project       = var.project
  user_project_override = true
}

provider "google-beta" {
  project = var.project
  region  = module.policy.region
}
