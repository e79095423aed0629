"""Prometheus' own parser of what `/metrics` tells, before and after a request."""

from __future__ import annotations

import json
import sys
import time
from urllib.request import Request, urlopen

from prometheus_client.parser import text_string_to_metric_families

url, model = sys.argv[1:3]


def told() -> dict[str, float]:
    with urlopen(f"{url}/metrics") as answer:
        assert answer.headers["Content-Type"].startswith("text/plain; version=")
        text = answer.read().decode()
    families = list(text_string_to_metric_families(text))
    assert len({family.name for family in families}) == len(families)
    assert all(family.documentation and family.type != "unknown" for family in families)
    return {
        sample.name: sample.value
        for family in families
        for sample in family.samples
        if sample.labels.get("model_name") == model and "le" not in sample.labels
    }


body = {"model": model, "prompt": "Hello", "max_tokens": 3, "temperature": 0, "ignore_eos": True}
told()
before = told().get("vllm:generation_tokens_total", 0)
sent = Request(f"{url}/v1/completions", json.dumps(body).encode())
sent.add_header("Content-Type", "application/json")
urlopen(sent).read()
after = told()
assert after["vllm:generation_tokens_total"] == before + 3
assert after["vllm:e2e_request_latency_seconds_count"] >= 1
end = time.monotonic() + 60
while told()["vllm:num_requests_running"]:  # it is answered before its row is let go
    assert time.monotonic() < end, "it runs on"
    time.sleep(0.05)
print("all fine")
