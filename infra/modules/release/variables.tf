variable "folder" {
  description = "Folder of the root, from the repository's."
  type        = string
}

variable "connect" {
  description = "Command that writes the kubeconfig's context."
  type        = string
}

variable "login" {
  description = "Command that lets Docker push to the registry."
  type        = string
}

variable "registry" {
  description = "Registry and folder of the images."
  type        = string
}

variable "extras" {
  description = "More Python packages that the images need to reach the store."
  type        = string
  default     = ""
}

variable "store" {
  description = "Where bundles lie: an object store by its URI, or a volume by its storage class and size."
  type = object({
    uri           = optional(string, "")
    region        = optional(string, "us-east-1")
    storage_class = optional(string, "")
    size          = optional(string, "100Gi")
  })

  validation {
    condition     = (var.store.uri == "") != (var.store.storage_class == "")
    error_message = "store has either a uri or a storage_class."
  }
}

variable "mlflow" {
  description = "URL of the MLflow server; empty: none."
  type        = string
  default     = ""
}

variable "annotations" {
  description = "Annotations by which service accounts get their rights in the cloud: the chart's (store), that of training runs (runner), those of Kubeflow Pipelines' servers (pipelines)."
  type = object({
    store     = optional(map(string), {})
    runner    = optional(map(string), {})
    pipelines = optional(map(string), {})
  })
  default = {}
}

variable "metadata_server" {
  description = "Whether pods get their rights from the node's metadata server, which policies keep shut otherwise."
  type        = bool
  default     = false
}

variable "extra_objects" {
  description = "More objects that the chart makes."
  type        = list(any)
  default     = []
}

variable "ledger" {
  description = "PostgreSQL: host, user and a command that prints the password, fit for a URL."
  type = object({
    host     = string
    user     = string
    password = string
  })
}

variable "pipelines" {
  description = "What Kubeflow Pipelines needs: MySQL, and a bucket by S3's interface, with keys or without; null: it is not installed."
  type = object({
    mysql    = string # host
    user     = string
    password = string # command that prints it
    host     = string # of S3's interface
    region   = string
    bucket   = string
    keys     = bool # whether a Secret with keys is needed
  })
  default = null
}

variable "keys" {
  description = "Command that makes the keys of the pipelines' bucket and prints both; empty where none are needed."
  type        = string
  default     = ""
}

variable "expander" {
  description = "Priorities of Cluster Autoscaler, if it is one that reads them."
  type        = string
  default     = ""
}

variable "addons" {
  description = "Lines that install what the cloud does not, before anything else."
  type        = list(string)
  default     = []
}
