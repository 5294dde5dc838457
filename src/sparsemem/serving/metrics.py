"""Numbers for Prometheus."""

from prometheus_client import CollectorRegistry, Counter, Gauge, generate_latest

from .engine import Engine


class Metrics:
    """Requests by path and status, and what the engine has done."""

    def __init__(self, engine: Engine) -> None:
        self._registry = CollectorRegistry()
        self.requests = Counter(
            "sparsemem_requests", "Requests that were answered.", ["path", "status"], registry=self._registry
        )
        gauges = {
            "sparsemem_requests_running": ("Requests in the batch.", lambda: engine.num_running),
            "sparsemem_requests_waiting": ("Requests in the queue.", lambda: engine.num_waiting),
            "sparsemem_prompt_tokens_total": ("Tokens of prompts.", lambda: engine.num_prompt_tokens),
            "sparsemem_generated_tokens_total": ("Tokens of answers.", lambda: engine.num_generated_tokens),
        }
        for name, (about, read) in gauges.items():
            Gauge(name, about, registry=self._registry).set_function(read)

    def text(self) -> str:
        return generate_latest(self._registry).decode()
