"""The values of the chart `helm/driftmill`: what can be set, and what a contract sets of it.

Every value is defined here and nowhere else. `python -m k8s.chart` writes the chart's
`values.yaml`, its `values.schema.json` and the table in its README from these models;
`for_model` fills them in for a contract.

What a Kubernetes object defines (`affinity`, `tolerations`, …) is given as Kubernetes writes it;
the schema takes its definition from Kubernetes' own.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, WithJsonSchema
from pydantic.alias_generators import to_camel

from driftmill import alerting, images
from driftmill.contract import Contract
from driftmill.monitor import rules

#: Key of a schema that stands for one of Kubernetes' own.
KUBERNETES = "x-kubernetes"


class Section(BaseModel):
    """Base of every part of the values: names in camelCase, no unknown keys."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        alias_generator=to_camel,
        validate_by_name=True,
        validate_by_alias=True,
        use_attribute_docstrings=True,
        protected_namespaces=(),
    )


def _kubernetes(kind: str) -> Any:
    """The schema of a kind that Kubernetes defines, such as `core.v1.Affinity`."""
    return WithJsonSchema({KUBERNETES: kind})


Affinity = Annotated[dict[str, Any], _kubernetes("core.v1.Affinity")]
EnvVar = Annotated[dict[str, Any], _kubernetes("core.v1.EnvVar")]
EnvFrom = Annotated[dict[str, Any], _kubernetes("core.v1.EnvFromSource")]
Resources = Annotated[dict[str, Any], _kubernetes("core.v1.ResourceRequirements")]
Toleration = Annotated[dict[str, Any], _kubernetes("core.v1.Toleration")]
Spread = Annotated[dict[str, Any], _kubernetes("core.v1.TopologySpreadConstraint")]
Volume = Annotated[dict[str, Any], _kubernetes("core.v1.Volume")]
VolumeMount = Annotated[dict[str, Any], _kubernetes("core.v1.VolumeMount")]
PodSecurity = Annotated[dict[str, Any], _kubernetes("core.v1.PodSecurityContext")]
ContainerSecurity = Annotated[dict[str, Any], _kubernetes("core.v1.SecurityContext")]
Peer = Annotated[dict[str, Any], _kubernetes("networking.v1.NetworkPolicyPeer")]
Egress = Annotated[dict[str, Any], _kubernetes("networking.v1.NetworkPolicyEgressRule")]
Strategy = Annotated[dict[str, Any], _kubernetes("apps.v1.DeploymentStrategy")]
Behavior = Annotated[dict[str, Any], _kubernetes("autoscaling.v2.HorizontalPodAutoscalerBehavior")]
AccessMode = Literal["ReadWriteOnce", "ReadWriteMany", "ReadOnlyMany", "ReadWriteOncePod"]
Quantity = Annotated[str, Field(pattern=r"^\d+(\.\d+)?(m|Ki|Mi|Gi|Ti|Pi|k|M|G|T|P)?$")]
ModelName = Annotated[str, Field(pattern="^[a-z0-9]([a-z0-9-]{0,38}[a-z0-9])?$")]
#: Start of the names of Services, so it begins with a letter.
ObjectName = Annotated[str, Field(pattern="^([a-z]([a-z0-9-]{0,61}[a-z0-9])?)?$")]
#: Whether an object is made whose kind the cluster may not know.
Mode = Literal["always", "skipIfMissing", "failIfMissing", "never"]
PullPolicy = Literal["IfNotPresent", "Always", "Never"]
PromDuration = Annotated[str, Field(pattern=r"^([0-9]+(ms|s|m|h|d|w|y))+$")]


class Image(Section):
    """A container image."""

    repository: str = Field(min_length=1)
    """Registry, folder and name."""
    tag: str = ""
    """Tag; empty: the chart's appVersion."""
    digest: Annotated[str, Field(pattern="^(sha256:[0-9a-f]{64})?$")] = ""
    """Digest; where given, it is what is pulled."""


class Images(Section):
    """The container images."""

    pull_policy: PullPolicy = "IfNotPresent"
    """When an image is pulled. Tags go by content, so that one on the node is the right one."""
    pull_secrets: tuple[str, ...] = ()
    """Names of existing Secrets for private registries."""
    service_tabular: Image = Image(repository="driftmill/service-tabular")
    """Serves a model of tables."""
    service_vision: Image = Image(repository="driftmill/service-vision")
    """Serves a model of images."""
    monitor: Image = Image(repository="driftmill/monitor")
    """Watches a model."""
    controller: Image = Image(repository="driftmill/controller")
    """Decides about retraining."""
    training_tabular: Image = Image(repository="driftmill/python-tabular")
    """Trains a model of tables."""
    training_vision: Image = Image(repository="driftmill/python-vision")
    """Trains a model of images."""


class Claim(Section):
    """A persistent volume."""

    existing_claim: str = ""
    """Name of a claim that is there; empty: one is made."""
    size: Quantity = "10Gi"
    """Size of the claim that is made."""
    storage_class: str = ""
    """Storage class; empty: the cluster's default, `-`: none."""
    access_modes: tuple[AccessMode, ...] = ("ReadWriteOnce",)
    """Access modes of the claim that is made."""
    keep: bool = False
    """Whether the claim that is made, and all in it, stays when the release is uninstalled."""


class StoreImage(Section):
    """A store in an OCI image: it serves what the image holds, and nothing is learnt."""

    reference: str = ""
    """The image, best by digest; its folder `/` holds what a store's folder holds."""
    pull_policy: PullPolicy = "IfNotPresent"
    """When it is pulled."""


class Store(Section):
    """Where bundles, rollout and inference log lie."""

    type: Literal["s3", "pvc", "image"] = "s3"
    """`s3`: an object store; `pvc`: a volume that all pods mount; `image`: an OCI image, mounted as
    a volume (Kubernetes 1.33 with the feature ImageVolume; monitor and controller must be off)."""
    uri: Annotated[str, Field(pattern="^((s3|gs)://.+)?$")] = ""
    """Bucket and prefix, such as `s3://models/driftmill`; needed for `s3`."""
    endpoint: str = ""
    """URL of an S3 server that is not AWS."""
    region: str = "us-east-1"
    """Region of the bucket."""
    existing_secret: str = "driftmill-store"  # noqa: S105 (a name)
    """Secret with AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY. It may be missing, as where the
    cloud gives the service account its rights."""
    pvc: Claim = Claim(access_modes=("ReadWriteMany",), keep=True)
    """The volume of `pvc`. By default it stays when the release is uninstalled: the models are
    nowhere else."""
    image: StoreImage = StoreImage()
    """The image of `image`."""


class Tracking(Section):
    """Where training runs are recorded for people."""

    uri: str = ""
    """URL of the MLflow server; empty: none, whatever the contract says of a local file."""
    existing_secret: str = "driftmill-tracking"  # noqa: S105 (a name)
    """Secret with MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD; it may be missing."""


class Signing(Section):
    """Signatures of bundles."""

    existing_secret: str = ""
    """Secret with the keys, in PEM; empty: nothing is signed, and no signature is demanded."""
    private_key: str = "signing.pem"
    """Key in that Secret of the private key, which only the pods that train get; empty: they sign
    nothing."""
    public_key: str = "trusted.pem"
    """Key in that Secret of the public keys, whose signatures are demanded."""


class ServiceAccount(Section):
    """A service account."""

    create: bool = True
    """Whether it is made."""
    name: str = ""
    """Its name; empty: from the release."""
    annotations: dict[str, str] = {}
    """Annotations, such as those by which a cloud gives it rights."""


class Pods(Section):
    """Settings of pods."""

    resources: Resources = {}
    """Requests and limits."""
    node_selector: dict[str, str] = {}
    """Labels that a node must bear."""
    tolerations: tuple[Toleration, ...] = ()
    """Taints that are tolerated."""
    affinity: Affinity = {}
    """Affinity."""
    priority_class_name: str = ""
    """Priority class."""
    pod_annotations: dict[str, str] = {}
    """More annotations of the pods."""
    pod_labels: dict[str, str] = {}
    """More labels of the pods."""
    extra_env: tuple[EnvVar, ...] = ()
    """More environment variables."""
    extra_env_from: tuple[EnvFrom, ...] = ()
    """ConfigMaps and Secrets that become environment variables."""
    extra_volumes: tuple[Volume, ...] = ()
    """More volumes."""
    extra_volume_mounts: tuple[VolumeMount, ...] = ()
    """Where they are mounted."""


class Probe(Section):
    """How often a pod is asked and how patiently."""

    period_seconds: int = Field(5, ge=1)
    """Seconds between two questions."""
    timeout_seconds: int = Field(3, ge=1)
    """Seconds for an answer."""
    failure_threshold: int = Field(3, ge=1)
    """Failures in a row that count."""


class Probes(Section):
    """Probes of the service."""

    startup: Probe = Probe(period_seconds=1, failure_threshold=60)
    """Whether the process has come up (`/livez`)."""
    liveness: Probe = Probe(period_seconds=10)
    """Whether it lives (`/livez`)."""
    readiness: Probe = Probe(period_seconds=2)
    """Whether it has a model and may be asked (`/readyz`)."""


class Keda(Section):
    """Scaling by requests a second, as Prometheus counts them."""

    prometheus: str = "http://prometheus-operated.monitoring.svc:9090"
    """URL of Prometheus."""
    requests_per_second: int = Field(500, ge=1)
    """What a pod is to take."""
    polling_seconds: int = Field(15, ge=1)
    """Seconds between two looks."""


class Autoscaling(Section):
    """How many pods serve."""

    type: Literal["none", "hpa", "keda"] = "none"
    """`none`: as many as `replicas` says; `hpa`: by CPU; `keda`: by requests."""
    min_replicas: int = Field(2, ge=1)
    """At least."""
    max_replicas: int = Field(10, ge=1)
    """At most."""
    cpu_percent: int = Field(70, ge=1, le=1000)
    """Share of the requested CPU that `hpa` aims at."""
    behavior: Behavior = {}
    """How quickly pods come and go; empty: Kubernetes' own, up at once, down after 5 minutes."""
    keda: Keda = Keda()
    """Settings of `keda`."""


class DisruptionBudget(Section):
    """What a node drain leaves alone. A budget is made where more than one pod serves."""

    enabled: bool = True
    """Whether it is made."""
    max_unavailable: int | Annotated[str, Field(pattern="^[0-9]+%$")] = 1
    """Pods that may be missing, as number or per cent."""


class Canary(Section):
    """A second Deployment of other software beside the first. (New *models* have a canary inside
    the service, by the contract's `serve.canary`.)"""

    enabled: bool = False
    """Whether there is one."""
    weight: int = Field(0, ge=0, le=100)
    """Per cent of the requests that the route gives it; none until it has a pod that is ready."""
    replicas: int = Field(1, ge=1)
    """Pods."""
    tag: str = ""
    """Tag of its image; empty: the service's."""
    digest: Annotated[str, Field(pattern="^(sha256:[0-9a-f]{64})?$")] = ""
    """Digest of its image."""


class Access(Section):
    """Who may call the service. Health is open to all."""

    enabled: bool = True
    """Whether bearer tokens are asked for, of the rights `predict`, `feedback`, `metrics` and
    `admin`."""
    existing_secret: str = ""
    """Secret whose keys are the rights, each with a token; a right without one is given to nobody.
    Empty: one is made, with random tokens that upgrades keep. What only renders the chart
    (`helm template`, Argo CD) cannot keep them: name one there."""
    rate: int = Field(0, ge=0)
    """Requests a second that one client may send to a pod, for predictions and with labels; 0: any
    number."""


class Service(Pods):
    """The service that predicts."""

    enabled: bool = True
    """Whether the model is served."""
    replicas: int = Field(2, ge=0)
    """Pods, where nothing scales them."""
    resources: Resources = {
        "requests": {"cpu": "250m", "memory": "256Mi"},
        "limits": {"memory": "1Gi"},
    }
    """Requests and limits. No limit of CPU: it would slow answers down on an idle node."""
    type: Literal["ClusterIP", "NodePort", "LoadBalancer"] = "ClusterIP"
    """Type of the Kubernetes Service."""
    annotations: dict[str, str] = {}
    """Annotations of the Kubernetes Service."""
    access: Access = Access()
    """Who may call it."""
    spool_size: Quantity = "1Gi"
    """Room for what the inference log has not yet moved into the store."""
    pre_stop_seconds: int = Field(5, ge=0)
    """Seconds between the decision to end a pod and the signal: the time in which the cluster
    learns to send nothing more."""
    drain_seconds: int = Field(20, ge=0)
    """Seconds that clients get to leave after the signal."""
    topology_spread_constraints: tuple[Spread, ...] = ()
    """How pods are spread; empty: over nodes, where possible, and by affinity over zones."""
    probes: Probes = Probes()
    """Probes."""
    autoscaling: Autoscaling = Autoscaling()
    """How many pods serve."""
    disruption_budget: DisruptionBudget = DisruptionBudget()
    """What a node drain leaves alone."""
    canary: Canary = Canary()
    """A second Deployment beside the first."""


class Monitor(Pods):
    """The monitor, which watches for drift."""

    enabled: bool = True
    """Whether the model is watched."""
    resources: Resources = {
        "requests": {"cpu": "100m", "memory": "512Mi"},
        "limits": {"memory": "2Gi"},
    }
    """Requests and limits."""
    webhook: Literal["auto", "direct", "none"] = "auto"
    """Who tells the controller of alarms: `direct`: the monitor; `none`: Alertmanager alone;
    `auto`: the monitor where no AlertmanagerConfig is made."""


class Ledger(Section):
    """The database of decisions and runs."""

    type: Literal["sqlite", "postgres"] = "sqlite"
    """`sqlite`: a file on a volume, for one controller; `postgres`: for several."""
    existing_secret: str = ""
    """Secret that holds the URL of `postgres`, as `postgresql+psycopg://user:password@host/name`."""
    key: str = "url"
    """Key in that Secret."""
    pvc: Claim = Claim(size="1Gi")
    """The volume of `sqlite`."""


class Token(Section):
    """The bearer token of the controller's webhook."""

    existing_secret: str = ""
    """Secret that holds it; empty: one is made, with a random token that upgrades keep. What only
    renders the chart (`helm template`, Argo CD) cannot keep it: name one there."""
    key: str = "token"
    """Key in that Secret."""


class Kubeflow(Section):
    """Kubeflow Pipelines, for the runner `kubeflow`."""

    endpoint: str = "http://ml-pipeline.kubeflow.svc:8888"
    """URL of its API."""
    existing_secret: str = ""
    """Secret with a bearer token for it."""
    key: str = "token"
    """Key in that Secret."""


class Controller(Pods):
    """The controller, which decides about retraining."""

    enabled: bool = True
    """Whether there is one."""
    replicas: int = Field(1, ge=1)
    """Pods; more than one needs a ledger in Postgres. One is enough for most: what it knows is in
    ledger, store and cluster, and Alertmanager repeats what was not taken."""
    resources: Resources = {
        "requests": {"cpu": "50m", "memory": "256Mi"},
        "limits": {"memory": "1Gi"},
    }
    """Requests and limits."""
    runner: Literal["job", "kubeflow"] = "job"
    """What trains: `job`: a Kubernetes Job of this namespace; `kubeflow`: Kubeflow Pipelines."""
    train_first: bool = True
    """Whether it trains the first model where none serves yet."""
    ledger: Ledger = Ledger()
    """The database of decisions and runs."""
    token: Token = Token()
    """The bearer token of its webhook."""
    kubeflow: Kubeflow = Kubeflow()
    """Kubeflow Pipelines, for the runner `kubeflow`."""
    service_account: ServiceAccount = ServiceAccount()
    """Its service account; with the runner `job` it may make Jobs in its namespace."""


class Recurring(Section):
    """Training by the clock, without a controller. (With one, the contract's `retrain.schedule`
    does it.)"""

    type: Literal["none", "cronjob", "kubeflow"] = "none"
    """`cronjob`: a CronJob that runs the pipeline; `kubeflow`: a recurring run of Kubeflow
    Pipelines."""
    schedule: str = "0 3 * * *"
    """Cron expression (five fields, UTC)."""


class Training(Pods):
    """The pods that train. CPU, memory, GPUs and node choice come from the contract's
    `train.resources`; what stands here is added."""

    keep_seconds: int = Field(86400, ge=600)
    """Seconds after which a finished Job goes away."""
    retries: int = Field(2, ge=0)
    """Pods that may be lost before a run has failed; those that go with their node do not count."""
    recurring: Recurring = Recurring()
    """Training by the clock."""


class Rule(Section):
    """A rule of Prometheus, under the names that Prometheus uses."""

    record: str = ""
    """Name of the series that it records."""
    alert: str = ""
    """Name of the alert."""
    expr: str = Field(min_length=1)
    """What is evaluated."""
    for_: Annotated[str, Field(alias="for")] = ""
    """How long it must be true before it fires."""
    keep_firing_for: Annotated[str, Field(alias="keep_firing_for")] = ""
    """How long it fires on after that."""
    labels: dict[str, str] = {}
    """Labels of the series or the alert."""
    annotations: dict[str, str] = {}
    """Annotations of the alert."""


class RuleGroup(Section):
    """Rules that are evaluated one after the other."""

    name: str = Field(min_length=1)
    """Its name."""
    rules: tuple[Rule, ...]
    """The rules."""


class Model(Section):
    """A model. `driftmill compile CONTRACT` writes this part."""

    kind: Literal["tabular", "vision"] = "tabular"
    """What it is asked: tables or images."""
    contract: str = Field(min_length=1)
    """The contract, as text."""
    rules: tuple[RuleGroup, ...] = ()
    """Groups of Prometheus' rules."""
    service: Service = Service()
    """What differs from `service`."""
    monitor: Monitor = Monitor()
    """What differs from `monitor`."""
    controller: Controller = Controller()
    """What differs from `controller`."""
    training: Training = Training()
    """What differs from `training`."""


class NetworkPolicy(Section):
    """Who may talk to whom. All other traffic of the release's pods is shut."""

    enabled: bool = True
    """Whether the policies are made."""
    clients: tuple[Peer, ...] = (
        {"namespaceSelector": {"matchLabels": {"driftmill/may-call": "true"}}},
    )
    """Who may ask the services. A Gateway, or what reaches a node port or a load balancer, is a
    client, too: name its namespace or its addresses."""
    monitoring: tuple[Peer, ...] = (
        {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "monitoring"}}},
    )
    """Prometheus and Alertmanager: they read metrics and call the controller."""
    dns: tuple[Egress, ...] = (
        {
            "to": [
                {
                    "namespaceSelector": {
                        "matchLabels": {"kubernetes.io/metadata.name": "kube-system"}
                    }
                },
                {"ipBlock": {"cidr": "169.254.20.10/32"}},
            ],
            "ports": [{"port": 53, "protocol": "UDP"}, {"port": 53, "protocol": "TCP"}],
        },
    )
    """How the pods find names: Kubernetes' own DNS, and its cache on the node."""
    egress: tuple[Egress, ...] = (
        {
            "to": [
                {"namespaceSelector": {}},
                {"ipBlock": {"cidr": "0.0.0.0/0", "except": ["169.254.0.0/16"]}},
            ]
        },
    )
    """What the pods reach beside each other and DNS: the store, the tracking server, data, the
    database of the ledger, Kubeflow Pipelines. By default all but the nodes' own addresses, where
    clouds give out credentials; name what is needed, and the rest is shut."""
    kubernetes_api: tuple[Egress, ...] = (
        {"ports": [{"port": 443, "protocol": "TCP"}, {"port": 6443, "protocol": "TCP"}]},
    )
    """How the controller reaches the Kubernetes API, which no selector can name."""


class ServiceMonitor(Section):
    """What Prometheus reads."""

    mode: Mode = "skipIfMissing"
    """Whether it is made where the cluster does not know its kind."""
    interval: PromDuration = "15s"
    """Time between two readings: short, an alarm is quick; long, Prometheus has less to keep."""
    labels: dict[str, str] = {}
    """More labels, as Prometheus' selector asks for."""


class PrometheusRule(Section):
    """What Prometheus evaluates."""

    mode: Mode = "skipIfMissing"
    """Whether it is made where the cluster does not know its kind."""
    interval: PromDuration = "15s"
    """Time between two evaluations."""
    labels: dict[str, str] = {}
    """More labels, as Prometheus' selector asks for."""
    runbooks: str = rules.RUNBOOKS
    """URL below which the alerts' pages lie."""


class AlertmanagerConfig(Section):
    """Whom Alertmanager tells."""

    mode: Mode = "skipIfMissing"
    """Whether it is made where the cluster does not know its kind."""
    group_wait: PromDuration = alerting.GROUP_WAIT
    """Time before the first word of an alarm."""
    group_interval: PromDuration = alerting.GROUP_INTERVAL
    """Time before news of it."""
    repeat_interval: PromDuration = alerting.REPEAT_INTERVAL
    """Time after which it is told again: how soon a controller that said no is asked again."""
    labels: dict[str, str] = {}
    """More labels, as Alertmanager's selector asks for."""


class Dashboards(Section):
    """Grafana's dashboards, as ConfigMaps for its sidecar."""

    enabled: bool = True
    """Whether they are made."""
    namespace: str = ""
    """Where; empty: the release's namespace."""
    labels: dict[str, str] = {"grafana_dashboard": "1"}
    """Labels by which the sidecar knows them."""
    annotations: dict[str, str] = {"grafana_folder": "Driftmill"}
    """Annotations, such as the folder."""


class Monitoring(Section):
    """Objects of the Prometheus operator, and Grafana's dashboards."""

    service_monitor: ServiceMonitor = ServiceMonitor()
    """What Prometheus reads."""
    prometheus_rule: PrometheusRule = PrometheusRule()
    """What Prometheus evaluates."""
    alertmanager_config: AlertmanagerConfig = AlertmanagerConfig()
    """Whom Alertmanager tells."""
    dashboards: Dashboards = Dashboards()
    """Grafana's dashboards."""


class ParentRef(Section):
    """A Gateway."""

    name: str = Field(min_length=1)
    """Its name."""
    namespace: str = ""
    """Its namespace; empty: the release's."""
    section_name: str = ""
    """One of its listeners; empty: all that fit."""


class Route(Section):
    """A route of the Gateway API from outside to the services: `<prefix>/<model>/predict`."""

    mode: Mode = "never"
    """Whether it is made where the cluster does not know its kind."""
    parent_refs: tuple[ParentRef, ...] = ()
    """The Gateways that carry it; one at least."""
    hostnames: tuple[str, ...] = ()
    """Host names; empty: those of the Gateway."""
    prefix: Annotated[str, Field(pattern="^/([a-z0-9/-]*[a-z0-9])?$")] = "/"
    """What comes before the model's name in the path."""
    annotations: dict[str, str] = {}
    """Annotations."""


class Test(Section):
    """The pod of `helm test`."""

    enabled: bool = True
    """Whether it is made."""
    timeout_seconds: int = Field(60, ge=1)
    """Seconds for all of its checks of a model."""


class Values(Section):
    """All values."""

    global_: Annotated[dict[str, Any], Field(alias="global")] = {}
    """Values that a parent chart shares; unused here."""
    name_override: ObjectName = ""
    """In place of the chart's name in the names of objects."""
    fullname_override: ObjectName = ""
    """In place of release and chart in the names of objects."""
    common_labels: dict[str, str] = {}
    """More labels of every object."""
    common_annotations: dict[str, str] = {}
    """More annotations of every object."""
    models: dict[ModelName, Model] = {}
    """The models by name; `driftmill compile` writes one, several files give several."""
    images: Images = Images()
    """The container images."""
    store: Store = Store()
    """Where bundles, rollout and inference log lie."""
    tracking: Tracking = Tracking()
    """Where training runs are recorded for people."""
    signing: Signing = Signing()
    """Signatures of bundles."""
    service: Service = Service()
    """The service that predicts, of every model."""
    monitor: Monitor = Monitor()
    """The monitor, of every model."""
    controller: Controller = Controller()
    """The controller, of every model."""
    training: Training = Training()
    """The pods that train."""
    service_account: ServiceAccount = ServiceAccount()
    """The account of services, monitors and training. It has no rights in the cluster and no
    token; a cloud may give it rights to the store."""
    pod_security_context: PodSecurity = {
        "runAsNonRoot": True,
        "runAsUser": 65532,
        "runAsGroup": 65532,
        "fsGroup": 65532,
        "fsGroupChangePolicy": "OnRootMismatch",
        "seccompProfile": {"type": "RuntimeDefault"},
    }
    """Security of every pod, as the Pod Security level `restricted` asks for."""
    security_context: ContainerSecurity = {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    """Security of every container."""
    network_policy: NetworkPolicy = NetworkPolicy()
    """Who may talk to whom."""
    monitoring: Monitoring = Monitoring()
    """What Prometheus, Alertmanager and Grafana get."""
    route: Route = Route()
    """A route of the Gateway API."""
    test: Test = Test()
    """The pod of `helm test`."""
    extra_objects: tuple[dict[str, Any] | str, ...] = ()
    """More objects: as they are, or as text with templates in it."""


def for_model(
    contract: Contract, *, store: str, text: str, training: str | None = None
) -> dict[str, Any]:
    """The values of one model, as `values.yaml` has them; only what is not a default.

    Args:
        contract: the model's.
        store: URI of the store.
        text: the contract as the chart passes it on.
        training: image of training; None: the usual one.
    """
    kind: Literal["tabular", "vision"] = "vision" if contract.is_vision else "tabular"
    where = {"namespace": rules.NAMESPACE}
    # What the contract leaves open is the chart's business.
    asked = "replicas" in contract.serve.model_fields_set
    values = Values(
        store=Store(type="s3", uri=store)
        if store.startswith(("s3://", "gs://"))
        else Store(type="pvc"),
        images=_images(contract, kind, training),
        models={
            contract.model: Model(
                kind=kind,
                contract=text,
                rules=tuple(
                    RuleGroup.model_validate(group)
                    for group in rules.rules(contract, where=where)["groups"]
                ),
                **({"service": Service(replicas=contract.serve.replicas)} if asked else {}),
            )
        },
    )
    return values.model_dump(mode="json", by_alias=True, exclude_unset=True)


def _images(contract: Contract, kind: Literal["tabular", "vision"], training: str | None) -> Images:
    """The images that the model needs, under the names that `driftmill images build` gives."""
    gpu = contract.is_vision and contract.train.resources.gpu
    names = {
        f"service_{kind}": images.reference(f"service-{kind}"),
        "monitor": images.reference("monitor"),
        "controller": images.reference("controller"),
        f"training_{kind}": training or images.for_steps("vision-cuda" if gpu else kind),
    }
    return Images(**{name: _image(reference) for name, reference in names.items()})


def _image(reference: str) -> Image:
    """An image by its full name: `repository[:tag][@digest]`."""
    named, _, digest = reference.partition("@")
    folder, slash, name = named.rpartition("/")  # a registry's port is no tag
    name, _, tag = name.partition(":")
    given = {"tag": tag, "digest": digest}
    return Image(
        repository=f"{folder}{slash}{name}", **{key: value for key, value in given.items() if value}
    )
