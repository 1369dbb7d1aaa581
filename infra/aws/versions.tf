terraform {
  required_version = ">= 1.11.1"

  required_providers {
    aws = {
      source  = "hashicorp/aws"
      version = "~> 6.42"
    }
  }

  # State holds no password, yet the names of everything: keep it in a private bucket, as by
  # `terraform init -backend-config=backend.hcl`.
  backend "s3" {
    encrypt      = true
    use_lockfile = true
  }
}

provider "aws" {
  region = module.policy.region

  default_tags {
    tags = { project = module.policy.name, "managed-by" = "terraform" }
  }
}
