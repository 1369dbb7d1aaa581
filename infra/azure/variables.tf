variable "platform" {
  description = "File that describes the platform; see ../sizes."
  type        = string
  default     = "../sizes/small.yaml"
}

variable "subscription" {
  description = "Id of the subscription."
  type        = string

  validation {
    condition     = can(regex("^[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$", var.subscription))
    error_message = "subscription is a UUID; `az account show --query id` shows it."
  }
}

variable "admin_groups" {
  description = "Object ids of the Entra groups that administer the cluster; local accounts are off."
  type        = list(string)
  default     = []
}

variable "budget_start" {
  description = "First day of a month from which the budget counts, as 2026-12-01."
  type        = string

  validation {
    condition     = can(regex("^20[0-9]{2}-(0[1-9]|1[0-2])-01$", var.budget_start))
    error_message = "budget_start is the first day of a month, as 2026-12-01."
  }
}

variable "database_password" {
  description = "Password of the databases' user, best as TF_VAR_database_password=$(openssl rand -hex 24). It does not get into the state."
  type        = string
  sensitive   = true
  ephemeral   = true

  validation {
    condition     = can(regex("^[A-Za-z0-9]{24,}$", var.database_password))
    error_message = "database_password has 24 letters and digits at least, for it becomes part of a URL."
  }
}

variable "database_password_version" {
  description = "Raise it to have a new password set."
  type        = number
  default     = 1
}

variable "admin_cidrs" {
  description = "Networks from which the Kubernetes API may be reached over the internet. Empty: from the VPC alone, as by a VPN."
  type        = list(string)
  default     = []

  validation {
    condition     = alltrue([for cidr in var.admin_cidrs : can(cidrhost(cidr, 0)) && !endswith(cidr, "/0")])
    error_message = "admin_cidrs are networks such as 203.0.113.0/24; the whole internet is none."
  }
}

variable "network" {
  description = "Addresses of the virtual network; pods and services get others."
  type        = string
  default     = "10.40.0.0/16"

  validation {
    condition     = can(cidrsubnet(var.network, 8, 0))
    error_message = "network is a CIDR such as 10.40.0.0/16."
  }
}

variable "deletion_protection" {
  description = "Whether the resource group refuses to be destroyed."
  type        = bool
  default     = true
}
