"""Certificates, app folders and the checks before a run, against real TLS on loopback and real keys."""

from __future__ import annotations

import contextlib
import http.server
import json
import os
import signal
import socket
import ssl
import stat
import sys
import threading
import time
import tomllib
from pathlib import Path

import pytest
import torch
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_ssh_private_key, load_ssh_public_key
from typer.testing import CliRunner

from spryfl import api, cli, journal, packing, provenance, trace
from spryfl.config import Experiment
from spryfl.sites import bits, certs, doctor, folder, hashes, processes, typed


@pytest.fixture(scope="module")
def tls(tmp_path_factory) -> Path:
    made = tmp_path_factory.mktemp("certs") / "tls"
    certs.make(made, 2, ["superlink.example.org", "192.0.2.7"])
    return made


@pytest.fixture
def small(tiny, reviews) -> Experiment:
    return Experiment(
        model={"name": str(tiny)},
        data={"name": str(reviews), "group": "site"},
        partition={"clients": 3},
        train={"rounds": 2, "cohort": 3, "steps": 2},
    )


@contextlib.contextmanager
def answering(tls: Path | None, status: int = 200):
    """A server on loopback that speaks as the SuperLink does: /health, with its certificate."""

    class Health(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(status if self.path == "/health" else 404)
            self.end_headers()

        def log_message(self, *words):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Health)
    server.handle_error = lambda *words: None  # handshakes that the test breaks off on purpose
    if tls:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(tls / certs.SERVER, tls / certs.SERVER_KEY)
        server.socket = context.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server.server_address[1]
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def shake(tls: Path, name: str, ca: Path) -> dict:
    """The certificate that a strict client sees for a server of that name."""
    with answering(tls) as port:
        context = ssl.create_default_context(cafile=str(ca))
        context.verify_flags |= ssl.VERIFY_X509_STRICT
        with (
            socket.create_connection(("127.0.0.1", port), timeout=10) as plain,
            context.wrap_socket(plain, server_hostname=name) as safe,
        ):
            return safe.getpeercert()


# --- certificates and keys


@pytest.mark.parametrize("name", ["superlink.example.org", "192.0.2.7", "localhost", "127.0.0.1", "::1"])
def test_the_server_is_trusted_by_every_name_that_it_was_made_for(tls, name):
    assert shake(tls, name, tls / certs.CA)["notAfter"]


@pytest.mark.parametrize("name", ["other.example.org", "192.0.2.8"])
def test_and_by_no_other(tls, name):
    with pytest.raises(ssl.SSLCertVerificationError):
        shake(tls, name, tls / certs.CA)


def test_another_authority_is_not_trusted(tls, tmp_path):
    certs.make(tmp_path / "other", 1, ["localhost"])
    with pytest.raises(ssl.SSLCertVerificationError, match="unable to get local issuer"):
        shake(tls, "localhost", tmp_path / "other" / certs.CA)


def test_keys_are_what_node_authentication_takes(tls):
    """A pair a site, ECDSA on P-384 in OpenSSH's format, the public one of each that of its private one."""
    seen = set()
    for i in range(2):
        private = load_ssh_private_key((tls / f"node{i}").read_bytes(), None)
        public = load_ssh_public_key((tls / f"node{i}.pub").read_bytes())
        assert isinstance(private.curve, ec.SECP384R1)
        assert private.public_key().public_numbers() == public.public_numbers()
        seen.add(public.public_numbers())
    assert len(seen) == 2


def test_private_keys_are_for_one_pair_of_eyes_whatever_the_umask(tmp_path):
    before = os.umask(0)
    try:
        certs.make(tmp_path / "tls", 3, ["localhost"])
    finally:
        os.umask(before)
    private = [p for p in (tmp_path / "tls").iterdir() if b"PRIVATE" in p.read_bytes()]
    assert {p.name for p in private} == {"server.key", "node0", "node1", "node2"}  # and none of the CA's
    assert {stat.S_IMODE(p.stat().st_mode) for p in private} == {0o600}


def test_certificates_end_when_they_were_told_to(tmp_path):
    certs.make(tmp_path / "tls", 1, ["localhost"], days=3)
    for name in (certs.CA, certs.SERVER):
        found = x509.load_pem_x509_certificate((tmp_path / "tls" / name).read_bytes())
        assert (found.not_valid_after_utc - found.not_valid_before_utc).days == 3


def test_the_authority_signs_servers_and_the_server_signs_nothing(tls):
    basic = [
        x509.load_pem_x509_certificate((tls / name).read_bytes()).extensions.get_extension_for_class(
            x509.BasicConstraints
        )
        for name in (certs.CA, certs.SERVER)
    ]
    assert [one.value.ca for one in basic] == [True, False]
    assert all(one.critical for one in basic)


def test_keys_in_use_are_never_overwritten(tls):
    before = {path: path.read_bytes() for path in tls.iterdir()}
    with pytest.raises(ValueError, match="is there already"):
        certs.make(tls, 1, ["localhost"])
    assert {path: path.read_bytes() for path in tls.iterdir()} == before


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ((0, ["localhost"], 1), "at least 1"),
        ((1, ["localhost"], 0), "at least 1"),
        ((1, ["superlink:8000"], 1), "without a port"),
        ((1, ["192.0.2.300"], 1), "neither a host name"),
        ((1, [""], 1), "neither a host name"),
        ((1, ["*.example.org"], 1), "neither a host name"),
    ],
)
def test_what_cannot_be_certified_is_refused_and_leaves_nothing(tmp_path, given, said):
    with pytest.raises(ValueError, match=said):
        certs.make(tmp_path / "tls", *given)
    assert not list(tmp_path.iterdir())


# --- the app folder


def test_the_folder_holds_the_whole_experiment(small, tmp_path):
    made = typed.federation(tmp_path / "app", "superlink.example.org:8443", tmp_path / "tls")
    folder.init(made.app, small, made, "0123", folder.classes(small))
    opened = folder.read(made.app)
    assert opened.experiment == small
    assert opened.labels == ("bad", "good")
    assert opened.made_with == {**folder.versions(), "noise": trace.fingerprint(), "model": "0123"}
    assert Experiment.load(made.app / "experiment.toml") == small
    app = tomllib.loads((made.app / "pyproject.toml").read_text())["tool"]["flwr"]["app"]
    assert app["components"] == {
        "serverapp": "spryfl.engines.flower:server_app",
        "clientapp": "spryfl.engines.flower:client_app",
    }
    assert all(isinstance(value, bool | int | float | str) for value in app["config"].values())  # Flower takes no more
    known = tomllib.loads((made.app / typed.HOME / "config.toml").read_text())["superlink"]
    ca = str((tmp_path / "tls" / "ca.crt").resolve())
    assert known[known["default"]] == {"address": "superlink.example.org:8443", "root-certificates": ca}


def test_files_are_named_so_that_other_processes_find_them(small, reviews, monkeypatch, tmp_path):
    monkeypatch.chdir(reviews.parent)
    relative = Experiment.load(None, {**small.as_dict(), "data": {"name": reviews.name, "group": "site"}})
    assert folder.settled(relative).data.name == str(reviews)
    assert folder.settled(Experiment()).data.name == "docstrings"


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # in what Flower imports
def test_what_flower_sends_is_the_project_file_alone(small, tmp_path):
    """No run folder, no note, no key that lies beside it."""
    import io
    import zipfile

    from flwr.cli.build import build_fab_from_disk

    made = typed.federation(tmp_path / "app", "localhost:8443", tmp_path / "app" / "tls")
    folder.init(made.app, small, made)
    certs.make(made.app / "tls", 1, ["localhost"])
    (made.app / "runs").mkdir()
    (made.app / "runs" / "records.jsonl").write_text("{}")
    names = zipfile.ZipFile(io.BytesIO(build_fab_from_disk(made.app))).namelist()
    assert [name for name in names if not name.startswith(".info")] == ["pyproject.toml"]


def test_a_folder_is_never_overwritten(small, tmp_path):
    made = typed.federation(tmp_path, "127.0.0.1:8000", None)
    with pytest.raises(ValueError, match="is there already"):
        folder.init(tmp_path, small, made)
    assert not list(tmp_path.iterdir())


def test_another_folder_is_not_taken_for_an_app(tmp_path):
    (tmp_path / "pyproject.toml").write_text('[project]\nname = "other"\n')
    with pytest.raises(ValueError, match="spryfl flower init"):
        folder.read(tmp_path)


@pytest.mark.parametrize("address", ["superlink.example.org:8000", "192.0.2.7:8000", "0.0.0.0:8000"])
def test_plain_http_stays_on_this_machine(address, tmp_path):
    with pytest.raises(ValueError, match="loopback alone"):
        typed.federation(tmp_path, address, None)
    assert "--insecure" not in typed.superlink(typed.federation(tmp_path, address, tmp_path))


@pytest.mark.parametrize("address", ["localhost", "localhost:", ":8000", "localhost:http", "localhost:70000"])
def test_an_address_is_a_host_and_a_port(address, tmp_path):
    with pytest.raises(ValueError, match="host:port"):
        typed.federation(tmp_path, address, tmp_path)


@pytest.mark.parametrize("address", ["127.0.0.1:8000", "localhost:8000", "[::1]:8000"])
def test_loopback_may_do_without(address, tmp_path):
    made = typed.federation(tmp_path, address, None)
    assert "--insecure" in typed.superlink(made)
    assert "--insecure" in typed.supernode(made, 0, "")
    assert "0.0.0.0" not in typed.superlink(made)


def test_sites_have_tls_and_keys_unless_they_are_told_otherwise(small, tmp_path):
    made = typed.federation(tmp_path, "superlink.example.org:8443", tmp_path / "tls")
    words = [word for step in folder.walk(made, small) for word in step.words if "simulat" not in " ".join(step.words)]
    assert "--insecure" not in words
    assert "--enable-supernode-auth" in words
    assert sum(word == "register" for word in words) == 3
    assert {str(tmp_path / "tls" / f"node{i}") for i in range(3)} <= set(words)


# --- the checks


def states(found) -> dict[str, str]:
    return {one.what: one.state for one in found}


def test_a_healthy_superlink_is_called_healthy(tls):
    with answering(tls) as port:
        found = list(doctor.reach(f"localhost:{port}", tls / certs.CA, False))
    assert states(found) == {"superlink": "ok", "certificate": "ok", "health": "ok"}


def test_a_certificate_of_another_authority_is_found(tls, tmp_path):
    certs.make(tmp_path / "other", 1, ["localhost"])
    with answering(tls) as port:
        found = list(doctor.reach(f"localhost:{port}", tmp_path / "other" / certs.CA, False))
    assert states(found) == {"superlink": "ok", "certificate": "wrong"}


def test_a_certificate_that_ends_soon_is_noted(tmp_path):
    certs.make(tmp_path / "tls", 1, ["localhost"], days=2)
    with answering(tmp_path / "tls") as port:
        found = list(doctor.reach(f"localhost:{port}", tmp_path / "tls" / certs.CA, False))
    assert states(found) == {"superlink": "ok", "certificate": "note", "health": "ok"}


def test_plain_http_where_tls_is_expected_is_found(tls):
    with answering(None) as port:
        secure = list(doctor.reach(f"localhost:{port}", tls / certs.CA, False))
        plain = list(doctor.reach(f"localhost:{port}", None, True))
    assert states(secure)["certificate"] == "wrong"
    assert states(plain) == {"superlink": "ok", "health": "ok"}


def test_a_port_where_nobody_is_and_one_where_another_is(tls):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    assert states(doctor.reach(f"localhost:{port}", tls / certs.CA, False)) == {"superlink": "wrong"}
    with answering(tls, status=503) as port:
        assert states(doctor.reach(f"localhost:{port}", tls / certs.CA, False))["health"] == "wrong"


def test_versions_beside_those_of_the_app_folder():
    here = {"spryfl": "1.0", "flwr": "1.41.0", "torch": "2.13.0+cpu", "peft": ""}
    assert set(states(doctor.versions(here | {"peft": "1"}, {})).values()) == {"ok"}
    there = {"spryfl": "1.1", "flwr": "1.41.2", "torch": "2.13.0", "peft": "1"}
    assert states(doctor.versions(here, there)) == {"spryfl": "wrong", "flwr": "ok", "torch": "ok", "peft": "wrong"}
    other = {"spryfl": "1.0", "flwr": "1.42.0", "torch": "2.12.0"}
    assert states(doctor.versions(here | {"peft": "1"}, other))["flwr"] == "wrong"
    assert states(doctor.versions(here | {"peft": "1"}, other))["torch"] == "note"


def test_noise_and_weights_must_be_the_same():
    own = trace.fingerprint()
    assert doctor.noise(own, own).state == doctor.noise(own, "").state == "ok"
    assert doctor.noise(own, "00000000").state == "wrong"
    assert doctor.model("a", "a", "m").state == doctor.model("a", "", "m").state == "ok"
    assert doctor.model("a", "b", "m").state == doctor.model("", "b", "m").state == "wrong"


def test_a_key_is_looked_at(tls, tmp_path):
    assert doctor.secret(tls / "node0").state == "ok"
    assert doctor.secret(tls / "node0.pub").state == "wrong"
    assert doctor.secret(tls / "node7").state == "wrong"
    text = (tls / "node0").read_bytes()
    (loose := tmp_path / "loose").write_bytes(text)
    loose.chmod(0o640)
    assert "chmod 600" in doctor.secret(loose).do
    form = serialization.Encoding.PEM, serialization.PrivateFormat.OpenSSH, serialization.NoEncryption()
    (short := tmp_path / "short").write_bytes(ec.generate_private_key(ec.SECP256R1()).private_bytes(*form))
    short.chmod(0o600)
    assert "P-384" in doctor.secret(short).said


def test_the_rows_of_a_site_are_read_as_the_run_will_read_them(small, reviews, tmp_path):
    good = doctor.rows(reviews / "test.csv", small, ("bad", "good"))
    assert good.state == "ok"
    assert "80 rows" in good.said
    lines = (reviews / "test.csv").read_text().splitlines()[1:]
    counts = [sum(line.split(",")[1] == name for line in lines) for name in ("bad", "good")]
    assert f"bad {counts[0]}, good {counts[1]}" in good.said
    assert doctor.rows(reviews / "test.csv", small).state == "note"  # no app folder: which classes?
    assert doctor.rows(reviews / "test.csv", small, ("bad", "fine")).state == "wrong"
    assert doctor.rows(tmp_path / "none.csv", small, ("bad", "good")).state == "wrong"
    (tmp_path / "bare.csv").write_text("text\nwithout a label\n")
    assert doctor.rows(tmp_path / "bare.csv", small, ("bad", "good")).state == "wrong"


# --- two runs, bit for bit


@pytest.fixture
def runs(small, tmp_path) -> tuple[Path, Path]:
    api.finetune(small, folder=tmp_path / "one")
    api.finetune(small, folder=tmp_path / "other")
    return tmp_path / "one", tmp_path / "other"


def test_a_run_and_its_repetition_are_the_same(runs):
    assert bits.differences(*runs) == []
    assert spryfl("flower", "same", *runs)[0] == 0


def test_one_bit_of_the_state_one_byte_of_the_adapter_one_record_are_found(runs):
    one, other = runs
    opened = journal.open_folder(other)
    state, progress = journal.load(opened)
    name = next(iter(state.params))
    value = state.params[name].clone()
    value.view(-1)[0] = torch.nextafter(value.view(-1)[0], torch.tensor(torch.inf))
    journal.save(opened, journal.NEWEST, state._replace(params={**state.params, name: value}), progress)
    assert bits.differences(one, other) == ["state: params"]
    adapter = other / "adapter" / "adapter_model.safetensors"
    adapter.write_bytes(adapter.read_bytes()[:-1] + b"\0\0")
    assert bits.differences(one, other) == ["state: params", "adapter: adapter_model.safetensors"]
    lines = opened.records_file.read_text().splitlines()
    opened.records_file.write_text("\n".join([*lines[:-1], lines[-1].replace('"loss": ', '"loss": 1')]) + "\n")
    assert any("round 2: loss" in one for one in bits.differences(one, other))
    assert spryfl("flower", "same", one, other)[0] == 2


def test_zeros_of_two_signs_are_two_things():
    zero = torch.zeros(2)
    assert bits.equal({"a": (zero, 1)}, {"a": (zero.clone(), 1)})
    assert not bits.equal(zero, -zero)
    assert not bits.equal(zero, zero.double())
    assert not bits.equal(zero, zero.to(torch.int32))  # the same bytes
    assert not bits.equal({"a": zero}, {"b": zero})


# --- processes


def test_a_process_and_what_it_started_are_gone_after_the_block(tmp_path):
    """The child starts another one, writes its id, and answers on a port; both are ended, by their ids."""
    port = processes.free_ports(1)
    code = (
        "import socket, subprocess, sys, time\n"
        "other = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        "open('other', 'w').write(str(other.pid))\n"
        f"server = socket.create_server(('127.0.0.1', {port}))\n"
        "time.sleep(600)\n"
    )
    words = [sys.executable, "-c", code]
    with processes.running(words, Path("app"), tmp_path, processes.answers(port)) as one:
        other = int((tmp_path / "other").read_text())
        os.kill(other, 0)
    assert one.returncode == -signal.SIGTERM
    until = time.monotonic() + 10
    while _alive(other):
        assert time.monotonic() < until
        time.sleep(0.05)


def _alive(pid: int) -> bool:
    """Whether a process runs; one that ended and was not yet waited for by anybody does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_one_that_ends_or_is_never_ready_is_told_of_with_its_log(tmp_path):
    said = [sys.executable, "-c", "print('no room'); raise SystemExit(3)"]
    with (
        pytest.raises(processes.FailedError, match=r"ended with 3[\s\S]*no room"),
        processes.running(said, Path("app"), tmp_path, lambda: False),
    ):
        pass
    deaf = [sys.executable, "-c", "import time; time.sleep(600)"]
    with (
        pytest.raises(processes.FailedError, match="is not ready"),
        processes.running(deaf, Path("app"), tmp_path, lambda: False, seconds=0.5),
    ):
        pass
    with pytest.raises(processes.FailedError, match=r"ended with 3[\s\S]*no room"):
        processes.call(said, Path("app"), tmp_path)


# --- the hash of the weights


def test_every_bit_of_the_weights_counts_and_the_head_does_not(tiny, tmp_path):
    from transformers import BertModel

    first = hashes.weights(Experiment(model={"name": str(tiny)}))
    assert first == hashes.weights(Experiment(model={"name": str(tiny)}, seed=5))  # another head
    model = BertModel.from_pretrained(tiny)
    with torch.no_grad():
        flat = model.encoder.layer[1].output.dense.weight.view(-1)
        flat[7] = torch.nextafter(flat[7], torch.tensor(torch.inf))
    model.save_pretrained(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((tiny / name).read_bytes())
    assert hashes.weights(Experiment(model={"name": str(tmp_path)})) != first
    assert hashes.weights(Experiment(model={"name": "nobody/has-this"})) == ""


def test_encoded_matrices_count_too_streamed_or_not(tiny, tmp_path):
    from transformers import BertModel

    other = BertModel.from_pretrained(tiny)
    with torch.no_grad():
        other.encoder.layer[1].output.dense.weight.neg_()
    other.save_pretrained(tmp_path / "other")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "other" / name).write_bytes((tiny / name).read_bytes())
    for source, name in ((tiny, "a"), (tmp_path / "other", "b")):
        packing.pack(str(source), tmp_path / name, "8bit")
    first, second = (hashes.weights(Experiment(model={"name": str(tmp_path / name)})) for name in "ab")
    assert first != second
    assert hashes.weights(Experiment(model={"name": str(tmp_path / "a"), "stream": True})) == first


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16, torch.int64, torch.bool])
def test_any_type_of_tensor_has_a_hash(kind):
    value = torch.tensor([[0, 1], [1, 0]]).to(kind)
    seen = {provenance.digest([("w", v)]) for v in (value, value.T, value.view(4), value.to(torch.float64))}
    assert len(seen) == 3  # this one is its own transpose
    assert provenance.digest([("w", value)]) == provenance.digest([("w", value.T)])


# --- as a user meets them


def spryfl(*words) -> tuple[int, str]:
    done = CliRunner().invoke(cli.app, [str(word) for word in words])
    if isinstance(done.exception, ValueError):
        return 2, str(done.exception)  # main() turns it into a message
    return done.exit_code, done.output


def test_commands_from_folder_to_a_clean_bill(small, tls, tmp_path):
    (tmp_path / "exp.toml").write_text(small.toml())
    code, said = spryfl(
        "flower", "init", tmp_path / "app", "--config", tmp_path / "exp.toml", "--superlink", "localhost:8443"
    )
    assert code == 0
    for step in folder.walk(typed.federation(tmp_path / "app", "localhost:8443", tmp_path / "app" / "tls"), small):
        assert typed.line(step.words) in said
    code, said = spryfl("flower", "certs", tmp_path / "app" / "tls", "--nodes", 3, "--host", "localhost")
    assert code == 0
    assert "SECRET" in said
    with answering(tmp_path / "app" / "tls") as port:
        where = ["--superlink", f"localhost:{port}", "--root-certificates", tmp_path / "app" / "tls" / certs.CA]
        key = ["--key", tmp_path / "app" / "tls" / "node2"]
        code, said = spryfl("flower", "doctor", tmp_path / "app", *where, *key)
    assert code == 0, said
    assert "wrong" not in said
    assert "as in the app folder" in said


def test_a_wrong_side_is_told_what_to_do_and_ends_in_two(small, tmp_path):
    made = typed.federation(tmp_path / "app", "localhost:8443", tmp_path / "tls")
    folder.init(made.app, small, made, "0123")
    project = made.app / "pyproject.toml"
    project.write_text(project.read_text().replace(f'noise = "{trace.fingerprint()}"', 'noise = "00000000"'))
    code, said = spryfl("flower", "doctor", made.app)
    assert code == 2
    assert json.dumps(trace.fingerprint()).strip('"') in said
    assert "Use the same files" in said  # the hash of the weights is another one too


def test_plain_http_needs_its_switch_and_loopback(small, tmp_path):
    code, said = spryfl("flower", "init", tmp_path / "a", "--superlink", "192.0.2.7:8000", "--insecure")
    assert code == 2
    assert "loopback alone" in said
    assert not (tmp_path / "a").exists()
    code, said = spryfl("flower", "init", tmp_path / "a", "--insecure", "--tls", tmp_path)
    assert code == 2
