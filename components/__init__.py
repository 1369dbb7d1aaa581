"""KFP components: typed and thin. A body calls `driftmill.steps`, where the work is.

| folder | components |
|---|---|
| `training/` | `prepare`, `fit`, `assemble`, `judge`: from rows or images to a judged model |
| `common/` | `promote`, `record`: how every pipeline ends |

All take the contract as JSON, the store's URI, `run_id` and, for runs that were given no id,
`job_id`: the id that Kubeflow Pipelines gave them.
"""
