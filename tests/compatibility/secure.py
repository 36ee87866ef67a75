"""Servers that are reached by TLS alone: Kafka with SCRAM, Postgres with hostssl; their own CA."""

import secrets
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from ipaddress import IPv4Address
from pathlib import Path

from confluent_kafka.admin import AdminClient
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from devstack.kafka import Broker, KafkaCluster
from devstack.postgres import PostgresServer
from devstack.state import Run

USER = "reservations"
PROTOCOLS = "CLIENT:SASL_SSL,SECOND:PLAINTEXT,CONTROLLER:PLAINTEXT"


@dataclass(frozen=True)
class Authority:
    """A CA, and a server's certificate that names 127.0.0.1 and nothing else."""

    ca: Path
    certificate: Path
    key: Path


def make_authority(folder: Path) -> Authority:
    """Make a CA and have it sign a server's certificate."""
    folder.mkdir()
    ca_key, key = (ec.generate_private_key(ec.SECP256R1()) for _ in range(2))
    issuer = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"ca {folder.name}")])
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "server")])
    now = datetime.now(UTC)

    def build(name: x509.Name, public: ec.EllipticCurvePublicKey) -> x509.CertificateBuilder:
        return (
            x509.CertificateBuilder()
            .subject_name(name)
            .issuer_name(issuer)
            .public_key(public)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - timedelta(hours=1))
            .not_valid_after(now + timedelta(days=1))
        )

    root = build(issuer, ca_key.public_key()).add_extension(
        x509.BasicConstraints(ca=True, path_length=0), critical=True
    )
    names = x509.SubjectAlternativeName([x509.IPAddress(IPv4Address("127.0.0.1"))])
    server = build(subject, key.public_key()).add_extension(names, critical=False)
    made = Authority(folder / "ca.pem", folder / "server.pem", folder / "server.key")
    pem = serialization.Encoding.PEM
    made.ca.write_bytes(root.sign(ca_key, hashes.SHA256()).public_bytes(pem))
    made.certificate.write_bytes(server.sign(ca_key, hashes.SHA256()).public_bytes(pem))
    made.key.write_bytes(
        key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    made.key.chmod(0o600)
    return made


class SecureKafka(KafkaCluster):
    """One broker whose clients come by TLS and SCRAM; it talks to itself and to audits without."""

    def __init__(self, run: Run, authority: Authority) -> None:
        super().__init__(run, "secure-kafka", 1)
        self._authority = authority
        self.password = secrets.token_urlsafe(24)
        self._keystore = run.path / "broker.pem"
        self._keystore.write_bytes(authority.key.read_bytes() + authority.certificate.read_bytes())

    @property
    def plain_servers(self) -> str:
        """The listener without TLS."""
        return f"127.0.0.1:{self.brokers[0].second_port}"

    def client_properties(self, ca: Path | None = None, password: str = "") -> dict[str, str]:
        """What a client has to know, by librdkafka's names."""
        return {
            "security.protocol": "SASL_SSL",
            "ssl.ca.location": str(ca or self._authority.ca),
            "sasl.mechanism": "SCRAM-SHA-512",
            "sasl.username": USER,
            "sasl.password": password or self.password,
        }

    def format_options(self) -> list[str]:
        """The user of SCRAM."""
        return ["--add-scram", f"SCRAM-SHA-512=[name={USER},password={self.password}]"]

    def properties(self, broker: Broker) -> dict[str, str]:
        """The settings of the broker, by Kafka's names."""
        settings = super().properties(broker)
        second = f"SECOND://127.0.0.1:{broker.second_port}"
        module = "org.apache.kafka.common.security.scram.ScramLoginModule required;"
        return settings | {
            "listeners": f"{settings['listeners']},{second}",
            "advertised.listeners": f"{settings['advertised.listeners']},{second}",
            "listener.security.protocol.map": PROTOCOLS,
            "inter.broker.listener.name": "SECOND",
            "sasl.enabled.mechanisms": "SCRAM-SHA-512",
            "listener.name.client.scram-sha-512.sasl.jaas.config": module,
            "ssl.keystore.type": "PEM",
            "ssl.keystore.location": str(self._keystore),
        }

    def _admin(self) -> AdminClient:
        return AdminClient(
            {
                **self.client_properties(),
                "bootstrap.servers": self.bootstrap_servers,
                "log_level": 0,
            }
        )


def secure_postgres(run: Run, name: str, authority: Authority) -> PostgresServer:
    """A Postgres server that lets nobody in without TLS."""
    rules = run.path / f"{name}.hba"
    rules.write_text("hostssl all all 127.0.0.1/32 scram-sha-256\n", encoding="ascii")
    settings = {
        "ssl": "on",
        "ssl_cert_file": str(authority.certificate),
        "ssl_key_file": str(authority.key),
        "hba_file": str(rules),
    }
    return PostgresServer(run, name, settings)
