variable "platform" {
  description = "File that describes the platform; see ../sizes."
  type        = string
  default     = "../sizes/small.yaml"
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

variable "admins" {
  description = "ARNs of IAM roles that administer the cluster."
  type        = list(string)
  default     = []
}

variable "network" {
  description = "Addresses of the VPC; /16 leaves room for 4000 pods a zone."
  type        = string
  default     = "10.40.0.0/16"

  validation {
    condition     = can(cidrsubnet(var.network, 4, 0))
    error_message = "network is a CIDR such as 10.40.0.0/16."
  }
}

variable "deletion_protection" {
  description = "Whether cluster, databases and buckets with objects in them refuse to be destroyed."
  type        = bool
  default     = true
}
