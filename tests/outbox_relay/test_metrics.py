"""What a scraper and a health check see, over HTTP."""

import http.client
import sys
import threading

from devstack.state import free_port
from outbox_relay.metrics import HEALTHY_WITHIN_S, Metrics, serve


def get(port: int, path: str) -> tuple[int, str]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    connection.request("GET", path)
    response = connection.getresponse()
    text = response.read().decode()
    connection.close()
    return response.status, text


def value(metrics: Metrics, name: str, **labels: str) -> float | None:
    return metrics.registry.get_sample_value(name, labels)


def test_a_scraper_reads_each_topic_s_numbers() -> None:
    metrics, port = Metrics(), free_port()
    metrics.leading(True)
    metrics.published("a", 3, 0.004)
    metrics.published("a", 2_000, 7.0)
    metrics.published("b", 1, 100.0)
    metrics.retried("BrokerNotAvailable", "b")
    metrics.lag("a", 12, 3.5)
    metrics.quarantined("b", 2)
    metrics.retention(partitions=6, default_filled=False)
    serve(metrics, "127.0.0.1", port)
    status, text = get(port, "/metrics")
    assert status == 200
    for line in (
        "outbox_relay_leader 1.0",
        "outbox_relay_standby 0.0",
        'outbox_relay_published_events_total{topic="a"} 2003.0',
        'outbox_relay_batch_rows_bucket{le="10.0",topic="a"} 1.0',
        'outbox_relay_commit_to_ack_seconds_bucket{le="0.005",topic="a"} 1.0',
        'outbox_relay_commit_to_ack_seconds_bucket{le="60.0",topic="b"} 0.0',
        'outbox_relay_commit_to_ack_seconds_count{topic="a"} 2.0',
        'outbox_relay_retries_total{reason="BrokerNotAvailable",topic="b"} 1.0',
        'outbox_relay_lag_rows{topic="a"} 12.0',
        'outbox_relay_oldest_unpublished_age_seconds{topic="a"} 3.5',
        'outbox_relay_quarantined{topic="b"} 2.0',
        "outbox_relay_outbox_partitions 6.0",
        "outbox_relay_outbox_default_filled 0.0",
    ):
        assert line in text.splitlines()
    assert get(port, "/elsewhere")[0] == 404


def test_who_no_longer_leads_tells_no_lag() -> None:
    metrics = Metrics()
    metrics.leading(True)
    metrics.lag("a", 12, 3.5)
    metrics.quarantined("a", 1)
    metrics.leading(False)
    metrics.standing_by(True)
    assert value(metrics, "outbox_relay_lag_rows", topic="a") is None
    assert value(metrics, "outbox_relay_oldest_unpublished_age_seconds", topic="a") is None
    assert value(metrics, "outbox_relay_quarantined", topic="a") is None
    assert value(metrics, "outbox_relay_leader") == 0
    assert value(metrics, "outbox_relay_standby") == 1


def test_one_lane_that_hangs_makes_the_relay_unhealthy() -> None:
    metrics, port = Metrics(), free_port()
    serve(metrics, "127.0.0.1", port)
    assert get(port, "/healthz")[0] == 200, "nothing has begun yet"
    for lane in ("main", "a", "b"):
        metrics.progressed(lane)
    assert get(port, "/healthz")[0] == 200
    metrics._progressed_at_s["b"] -= HEALTHY_WITHIN_S + 1
    metrics.progressed("main")
    assert get(port, "/healthz")[0] == 503
    metrics.forget("b")
    assert get(port, "/healthz")[0] == 200
    metrics._progressed_at_s["a"] -= 10
    assert not metrics.healthy(within_s=5)


def test_lanes_may_tell_their_progress_while_a_health_check_looks() -> None:
    metrics, usual_s = Metrics(), sys.getswitchinterval()

    def come_and_go(lane: int) -> None:
        for turn in range(3_000):
            metrics.progressed(f"{lane}-{turn}")
            metrics.forget(f"{lane}-{turn - 10}")
            metrics.published("a", 1, 0.001)

    threads = [threading.Thread(target=come_and_go, args=(lane,)) for lane in range(3)]
    sys.setswitchinterval(1e-6)
    try:
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads):
            assert metrics.healthy()
    finally:
        sys.setswitchinterval(usual_s)
    assert value(metrics, "outbox_relay_published_events_total", topic="a") == 9_000
