variable "platform" {
  description = "File that describes the platform; see ../sizes."
  type        = string
  default     = "../sizes/small.yaml"
}

variable "project" {
  description = "Id of the Google Cloud project."
  type        = string
}

variable "billing_account" {
  description = "Id of the billing account that the budget watches, as 000000-000000-000000."
  type        = string

  validation {
    condition     = can(regex("^[0-9A-F]{6}-[0-9A-F]{6}-[0-9A-F]{6}$", var.billing_account))
    error_message = "billing_account looks like 0A1B2C-3D4E5F-678901; `gcloud billing accounts list` shows it."
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
  description = "Addresses of the nodes; pods and services get others."
  type        = string
  default     = "10.40.0.0/20"

  validation {
    condition     = can(cidrhost(var.network, 0))
    error_message = "network is a CIDR such as 10.40.0.0/20."
  }
}

variable "deletion_protection" {
  description = "Whether cluster, databases and buckets with objects in them refuse to be destroyed."
  type        = bool
  default     = true
}
