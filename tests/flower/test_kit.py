"""The folders of a deployment: who gets what, and that what is in them works."""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import ipaddress
import json
import os
import re
import shutil
import signal
import socket
import ssl
import stat
import subprocess
import sys
import time
import tomllib
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

from fedistill.errors import RunError
from fedistill.flower.kit import FLEET, FLWR, OTHER_APPS, Kit, keys, write_kit

BIN = Path(sys.executable).parent
NGINX = shutil.which("nginx", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/local/sbin")
SITES = ("north-clinic", "south_bank", "west.shop")
OFF = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
}
needs_nginx = pytest.mark.skipif(NGINX is None, reason="nginx is not installed on this machine")


def make_kit(**changes) -> Kit:
    return replace(
        Kit(
            sites=SITES,
            host="coordinator.example.org",
            port=9443,
            federation="seed = 1\n",
            site_settings={site: f'id = "{site}"\n' for site in SITES},
            public={"proxy.npz": b"public rows"},
            coordinator={"test.npz": b"rows of the coordinator"},
            own={site: {"rows.npz": f"rows of {site}".encode()} for site in SITES},
        ),
        **changes,
    )


@pytest.fixture(scope="module")
def kit(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kit") / "deployment"
    write_kit(folder, make_kit())
    return folder


def all_files(folder):
    return sorted(path for path in folder.rglob("*") if path.is_file())


def scripts(folder):
    return [path for path in all_files(folder) if path.read_bytes().startswith(b"#!")]


def openssl(*arguments, **options):
    return subprocess.run(
        ["openssl", *map(str, arguments)], capture_output=True, text=True, check=True, **options
    ).stdout


# Who gets what


def test_every_party_gets_its_list_and_nothing_else(kit):
    site = """.dockerignore Dockerfile README.md bin/flwr-agentapp bin/flwr-clientapp
        bin/flwr-connector bin/flwr-model bin/flwr-serverapp bin/flwr-simulation ca.crt
        compose.yaml federation.toml fedistill-site.service node.key node.key.pub proxy.npz rows.npz
        site.toml start.sh wheels/.keep"""
    coordinator = """.dockerignore Dockerfile README.md app/fdapp/__init__.py app/fdapp/apps.py
        app/pyproject.toml ca.crt compose.yaml federation.toml fedistill-nginx.service
        fedistill-status.service fedistill-superlink.service nginx.conf proxy.npz
        register-sites.sh run.sh server.crt server.key start-nginx.sh start-superlink.sh
        test.npz wheels/.keep"""
    expected = {"README.md", "authority/ca.crt", "authority/ca.key", "authority/renew.sh"}
    expected |= {f"coordinator/{name}" for name in coordinator.split()}
    expected |= {f"coordinator/sites/{name}.pub" for name in SITES}
    expected |= {f"sites/{name}/{file}" for name in SITES for file in site.split()}
    assert {path.relative_to(kit).as_posix() for path in all_files(kit)} == expected


def test_a_private_key_is_in_one_folder_only(kit):
    held = {}
    for path in all_files(kit):
        for block in re.findall(rb"-----BEGIN [A-Z ]*PRIVATE KEY-----[^-]+", path.read_bytes()):
            held.setdefault(block, []).append(path.relative_to(kit).as_posix())
    assert sorted(held.values()) == [
        ["authority/ca.key"],
        ["coordinator/server.key"],
        *[[f"sites/{site}/node.key"] for site in SITES],
    ]


def test_rows_are_with_their_owner_only(kit):
    for secret, owner in [(f"rows of {site}", f"sites/{site}/") for site in SITES] + [
        ("rows of the coordinator", "coordinator/")
    ]:
        found = [
            path.relative_to(kit).as_posix()
            for path in all_files(kit)
            if secret.encode() in path.read_bytes()
        ]
        assert len(found) == 1
        assert found[0].startswith(owner)


@pytest.mark.parametrize("site", SITES)
def test_a_site_reads_of_no_other_site(kit, site):
    for path in all_files(kit / "sites" / site):
        for other in set(SITES) - {site}:
            assert other.encode() not in path.read_bytes(), path


def test_secrets_are_readable_by_their_owner_only(kit):
    for path in all_files(kit):
        secret = path.suffix == ".key" or path.name in ("rows.npz", "test.npz")
        executable = path.read_bytes().startswith(b"#!")
        mode = 0o600 if secret else 0o755 if executable else 0o644
        assert stat.S_IMODE(path.stat().st_mode) == mode, path
    for path in (kit, *(path for path in kit.rglob("*") if path.is_dir())):
        assert stat.S_IMODE(path.stat().st_mode) == 0o700, path
    for site in SITES:
        assert list((kit / "sites" / site / "state").iterdir()) == []


@pytest.mark.parametrize("mask", [0o000, 0o077])
def test_modes_do_not_depend_on_the_umask(tmp_path, mask):
    before = os.umask(mask)
    try:
        write_kit(tmp_path / "kit", make_kit())
    finally:
        os.umask(before)
    test_secrets_are_readable_by_their_owner_only(tmp_path / "kit")


def test_nothing_names_this_machine_or_a_package_registry(kit):
    for path in all_files(kit):
        text = path.read_bytes().lower()
        for word in (str(kit).encode(), sys.prefix.encode(), b"pypi", b"pytorch.org"):
            assert word not in text, (path, word)


# Keys and certificates


def test_openssl_accepts_the_server_for_its_names_and_no_others(kit):
    server = kit / "coordinator" / "server.crt"
    authority = kit / "authority" / "ca.crt"
    openssl("verify", "-x509_strict", "-purpose", "sslserver", "-CAfile", authority, server)
    for name in ("coordinator.example.org", "localhost"):
        openssl("verify", "-CAfile", authority, "-verify_hostname", name, server)
    for address in ("127.0.0.1", "::1"):
        openssl("verify", "-CAfile", authority, "-verify_ip", address, server)
    with pytest.raises(subprocess.CalledProcessError):
        openssl("verify", "-CAfile", authority, "-verify_hostname", "else.example.org", server)
    assert "Public-Key: (256 bit)" in openssl("x509", "-in", server, "-noout", "-text")
    assert len(server.read_bytes()) < 1200


@pytest.mark.parametrize("host", ["192.0.2.7", "2001:db8::7"])
def test_a_host_that_is_an_address_is_one_in_the_certificate(host, tmp_path):
    write_kit(tmp_path / "kit", make_kit(host=host))
    server = tmp_path / "kit" / "coordinator" / "server.crt"
    openssl("verify", "-CAfile", server.parent / "ca.crt", "-verify_ip", host, server)
    start = (tmp_path / "kit" / "sites" / SITES[0] / "start.sh").read_text()
    where = f"[{host}]:9443" if ":" in host else f"{host}:9443"
    assert f"${{FEDISTILL_SUPERLINK:-{where}}}" in start
    nginx = (tmp_path / "kit" / "coordinator" / "nginx.conf").read_text()
    assert (re.search(r"^\s*listen \[::\]", nginx, re.MULTILINE) is not None) == (":" in host)


def test_the_authority_signs_servers_and_nothing_else():
    from cryptography import x509

    key, certificate = keys.authority("a federation")
    basic = certificate.extensions.get_extension_for_class(x509.BasicConstraints)
    assert basic.critical
    assert (basic.value.ca, basic.value.path_length) == (True, 0)
    usage = certificate.extensions.get_extension_for_class(x509.KeyUsage)
    assert usage.critical
    assert usage.value == keys._usage("key_cert_sign", "crl_sign")
    certificate.verify_directly_issued_by(certificate)
    assert key.curve.name == "secp256r1"


@pytest.mark.parametrize("days", [1, 397])
def test_a_server_certificate_began_yesterday_and_lasts_as_long_as_asked(days):
    import datetime

    from cryptography import x509
    from cryptography.x509.oid import ExtendedKeyUsageOID

    _, certificate = keys.server_certificate(keys.authority("a"), ["a.example", "10.0.0.1"], days)
    lasts = certificate.not_valid_after_utc - certificate.not_valid_before_utc
    age = datetime.datetime.now(datetime.UTC) - certificate.not_valid_before_utc
    assert lasts == datetime.timedelta(days=days)
    assert datetime.timedelta(hours=23) < age < datetime.timedelta(hours=25)
    purpose = certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    assert list(purpose) == [ExtendedKeyUsageOID.SERVER_AUTH]
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["a.example", "localhost"]
    assert names.get_values_for_type(x509.IPAddress) == [
        ipaddress.ip_address(address) for address in ("10.0.0.1", "127.0.0.1", "::1")
    ]


@pytest.mark.parametrize("site", SITES)
def test_flower_reads_the_keys_of_a_site(kit, site):
    import argparse

    from flwr.cli.supernode.register import try_load_public_key
    from flwr.supercore.primitives.asymmetric import public_key_to_bytes
    from flwr.supernode.cli.flower_supernode import _try_setup_client_authentication

    folder = kit / "sites" / site
    loaded = _try_setup_client_authentication(
        argparse.Namespace(
            auth_supernode_private_key=str(folder / "node.key"), auth_supernode_public_key=None
        )
    )
    public = try_load_public_key(folder / "node.key.pub")
    assert loaded is not None
    assert public_key_to_bytes(loaded[1]) == public
    assert loaded[0].curve.name == "secp256r1"
    assert (folder / "node.key.pub").read_bytes() == (
        kit / "coordinator" / "sites" / f"{site}.pub"
    ).read_bytes()


def test_flower_reads_a_key_that_a_site_made_itself(tmp_path):
    """The command of the site's README."""
    from flwr.cli.supernode.register import try_load_public_key

    if shutil.which("ssh-keygen") is None:
        pytest.skip("ssh-keygen is not installed on this machine")
    made = ["ssh-keygen", "-q", "-t", "ecdsa", "-b", "384", "-N", "", "-C", "", "-f", "node.key"]
    subprocess.run(made, cwd=tmp_path, check=True)
    assert try_load_public_key(tmp_path / "node.key.pub")


def test_a_renewed_certificate_is_as_good_as_the_first(tmp_path):
    write_kit(tmp_path / "kit", make_kit())
    authority = tmp_path / "kit" / "authority"
    subprocess.run([authority / "renew.sh"], check=True, capture_output=True)
    openssl(
        *("verify", "-x509_strict", "-purpose", "sslserver", "-CAfile", authority / "ca.crt"),
        *("-verify_hostname", "coordinator.example.org", authority / "new" / "server.crt"),
    )
    ssl.create_default_context().load_cert_chain(
        authority / "new" / "server.crt", authority / "new" / "server.key"
    )
    assert {path.name for path in (authority / "new").iterdir()} == {"server.crt", "server.key"}
    assert stat.S_IMODE((authority / "new" / "server.key").stat().st_mode) == 0o600


def test_two_kits_share_no_key(tmp_path):
    for name in ("one", "two"):
        write_kit(tmp_path / name, make_kit())
    for path in ("authority/ca.key", "coordinator/server.key", f"sites/{SITES[0]}/node.key"):
        assert (tmp_path / "one" / path).read_bytes() != (tmp_path / "two" / path).read_bytes()


# Scripts, units, containers


def test_scripts_are_posix_shell(kit):
    found = scripts(kit)
    assert len(found) == 5 + (2 + len(OTHER_APPS)) * len(SITES)
    for path in found:
        subprocess.run(["sh", "-n", path], check=True)
    if shutil.which("shellcheck"):
        subprocess.run(["shellcheck", *found], check=True)


def test_no_process_calls_home(kit):
    starting = [
        path
        for path in all_files(kit)
        if path.suffix in (".sh", ".service", ".yaml") or path.name == "Dockerfile"
        if path.name != "renew.sh"  # openssl alone
    ]
    assert len(starting) == 4 + 3 + 2 + 4 * len(SITES)
    for path in starting:
        for name, value in OFF.items():
            assert re.search(rf'\b{name}(=|: "){value}\b', path.read_text()), (path, name)


def test_units_restart_for_ever(kit):
    units = [path for path in all_files(kit) if path.suffix == ".service"]
    for path in units:
        told = path.read_text()
        for line in (
            *("Restart=always", "RestartSec=10", "StartLimitIntervalSec=0", "TimeoutStopSec=90"),
            *("User=fedistill", "NoNewPrivileges=yes", "ProtectSystem=strict", "ProtectHome=yes"),
            *("PrivateTmp=yes", "UMask=0077", "KillMode=mixed"),
        ):
            assert f"\n{line}\n" in told, (path, line)


def test_systemd_understands_the_units(kit, tmp_path):
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd-analyze is not installed on this machine")
    for path in all_files(kit):
        if path.suffix == ".service":
            told = re.sub("ExecStart=.*", "ExecStart=/bin/true", path.read_text())
            (tmp_path / path.name).write_text(told)
    done = subprocess.run(
        ["systemd-analyze", "verify", *sorted(tmp_path.glob("*.service"))],
        capture_output=True,
        text=True,
    )
    if "Failed to initialize manager" in done.stderr:
        pytest.skip("systemd-analyze does not work in this container")
    assert (done.returncode, done.stderr) == (0, "")


def test_compose_files_parse(kit):
    yaml = pytest.importorskip("yaml")
    for path in all_files(kit):
        if path.name != "compose.yaml":
            continue
        for name, service in yaml.safe_load(path.read_text())["services"].items():
            assert service["restart"] == "always", name
            assert service["stop_grace_period"] == "90s"
            assert service["read_only"] is True
            assert {key: service["environment"][key] for key in OFF} == OFF
    services = yaml.safe_load((kit / "coordinator" / "compose.yaml").read_text())["services"]
    assert services["superlink"]["ports"] == ["9443:9443", "127.0.0.1:8080:8080"]
    for test in (services["superlink"]["healthcheck"]["test"],):
        compile(test[-1], "healthcheck", "exec")


def test_versions_are_those_of_the_constraints(kit):
    wanted = (Path(__file__).parents[2] / "constraints.txt").read_text()
    assert f"flwr=={FLWR}\n" in wanted
    for path in all_files(kit):
        if path.name == "Dockerfile":
            assert f'"flwr=={FLWR}" torch' in path.read_text()


def test_the_readmes_tell_what_to_compare(kit):
    """Both figures of the notes are those that the commands of the site's README print."""
    certificate = kit / "sites" / SITES[0] / "ca.crt"
    printed = openssl("x509", "-in", certificate, "-noout", "-fingerprint", "-sha256")
    digest = hashlib.sha256(b"public rows").hexdigest()
    for name in ("README.md", "coordinator/README.md"):
        told = (kit / name).read_text()
        assert printed.strip().rpartition("=")[2] in told
        assert digest in told
    site = (kit / "sites" / SITES[0] / "README.md").read_text()
    assert "openssl x509 -in ca.crt -noout -fingerprint -sha256" in site
    assert "sha256sum proxy.npz" in site
    assert digest not in site  # a figure that came with the file proves nothing


def stand_in(folder, *names):
    """Programs that say how they were called, instead of Flower's."""
    (folder / "bin").mkdir(parents=True)
    for name in names:
        path = folder / "bin" / name
        path.write_text(
            f'#!{sys.executable}\nimport sys, os, json\nprint(json.dumps({{"args": '
            'sys.argv[1:], "env": dict(os.environ), "cwd": os.getcwd()}))\n'
        )
        path.chmod(0o755)
    (folder / "bin" / "python3").write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    (folder / "bin" / "python3").chmod(0o755)
    return folder


@pytest.mark.parametrize(
    "name", ["plain", "a b", "it's", 'say "x"', "back\\slash", "both ' and \""]
)
def test_a_site_starts_wherever_its_folder_is(tmp_path, name):
    from flwr.common.config import parse_config_args

    folder = tmp_path / name
    write_kit(folder, make_kit())
    site = folder / "sites" / SITES[0]
    venv = stand_in(tmp_path / "venv", "flower-supernode")
    done = subprocess.run(
        [site / "start.sh"],
        env={"PATH": os.environ["PATH"], "FEDISTILL_VENV": str(venv)},
        check=True,
        capture_output=True,
        text=True,
    )
    told = json.loads(done.stdout)
    called = dict(zip(told["args"][::2], told["args"][1::2], strict=True))
    assert called == {
        "--root-certificates": "ca.crt",
        "--auth-supernode-private-key": "node.key",
        "--superlink": "coordinator.example.org:9443",
        "--host": "127.0.0.1",
        "--port": "8001",
        "--node-config": called["--node-config"],
    }
    assert parse_config_args([called["--node-config"]]) == {"site": str(site)}
    assert told["cwd"] == str(site)
    assert told["env"]["FLWR_HOME"] == f"{site}/state/flower"
    assert {name: told["env"][name] for name in OFF} == OFF


@pytest.mark.parametrize("broken", ["colon", "mode", "deleted", "missing venv"])
def test_a_site_does_not_start_where_foreign_code_could_run(tmp_path, broken):
    folder = tmp_path / ("a:b" if broken == "colon" else "kit")
    write_kit(folder, make_kit())
    site = folder / "sites" / SITES[0]
    if broken == "mode":
        (site / "bin" / "flwr-agentapp").chmod(0o644)
    if broken == "deleted":
        (site / "bin" / "flwr-clientapp").unlink()
    venv = tmp_path / "venv"
    if broken != "missing venv":
        stand_in(venv, "flower-supernode", "flwr-clientapp", *OTHER_APPS)
    done = subprocess.run(
        [site / "start.sh"],
        env={"PATH": "/usr/bin:/bin", "FEDISTILL_VENV": str(venv)},
        capture_output=True,
        text=True,
    )
    assert done.returncode != 0
    assert done.stdout == ""
    if broken != "missing venv":
        assert "start: expected to find" in done.stderr


def test_the_site_stands_in_for_every_program_that_a_supernode_would_start(kit):
    from flwr.supercore.constant import TASK_TYPE_TO_COMMAND

    assert set(TASK_TYPE_TO_COMMAND.values()) == {"flwr-clientapp", *OTHER_APPS}
    bin_ = kit / "sites" / SITES[0] / "bin"
    for name in OTHER_APPS:
        done = subprocess.run([bin_ / name, "--token", "x"], capture_output=True, text=True)
        assert done.returncode == 1
        assert done.stderr.startswith(f"{name}: refused")


def test_the_client_app_of_a_site_is_the_installed_one(kit, tmp_path):
    """A module in the current folder does not come first, not even by accident."""
    site = kit / "sites" / SITES[0]
    python = tmp_path / "python3"
    python.write_text('#!/bin/sh\necho "$@"\n')
    python.chmod(0o755)
    done = subprocess.run(
        [site / "bin" / "flwr-clientapp", "--token", "a b"],
        env={"PATH": f"{tmp_path}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "-P -m fedistill.flower.pinned --token a b\n"


def test_the_command_line_of_the_coordinator_finds_its_superlink(tmp_path):
    """Also after the folder has moved to a place with a difficult name."""
    folder = tmp_path / 'it\'s "here"'
    write_kit(tmp_path / "kit", make_kit())
    (tmp_path / "kit").rename(folder)
    coordinator = folder / "coordinator"
    venv = stand_in(tmp_path / "venv", "flower-superlink", "fedistill")
    told = {}
    for name, more in (("start-superlink.sh", []), ("run.sh", ["--resume"])):
        done = subprocess.run(
            [coordinator / name, *more],
            env={
                "PATH": os.environ["PATH"],
                "FEDISTILL_VENV": str(venv),
                "FEDISTILL_LISTEN": "0.0.0.0",
                "FEDISTILL_PORT": "12345",
            },
            check=True,
            capture_output=True,
            text=True,
        )
        told[name] = json.loads(done.stdout)
    written = tomllib.loads((coordinator / "flower" / "config.toml").read_text())["superlink"]
    assert written == {
        "default": "superlink",
        "superlink": {
            "address": "127.0.0.1:12345",
            "root-certificates": str(coordinator / "ca.crt"),
        },
    }
    assert told["run.sh"]["args"] == ["run", "federation.toml", "--out", "run", "--resume"]
    assert told["run.sh"]["env"]["FLWR_HOME"] == str(coordinator / "flower")
    arguments = told["start-superlink.sh"]["args"]
    assert "--enable-supernode-auth" in arguments
    assert "--disable-runtime-dependency-installation" in arguments
    assert "--insecure" not in arguments
    assert arguments[:4] == ["--host", "0.0.0.0", "--port", "12345"]
    for got in told.values():
        assert {name: got["env"][name] for name in OFF} == OFF


def test_run_wants_a_superlink_first(kit):
    done = subprocess.run([kit / "coordinator" / "run.sh"], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith("run: expected a SuperLink that was started here, found none")


# The app bundle


def test_the_app_bundle_is_small_and_holds_no_code_of_its_own(kit, tmp_path):
    project = tomllib.loads((kit / "coordinator" / "app" / "pyproject.toml").read_text())
    assert project["project"]["dependencies"] == []
    assert project["tool"]["flwr"]["app"] == {
        "publisher": "fedistill",
        "components": {"serverapp": "fdapp.apps:server", "clientapp": "fdapp.apps:client"},
        "config": {"job": ""},
    }
    subprocess.run(
        [BIN / "flwr", "build", "--app", kit / "coordinator" / "app"],
        cwd=tmp_path,
        env=os.environ | OFF | {"FLWR_HOME": str(tmp_path / "home")},
        check=True,
        capture_output=True,
    )
    (bundle,) = tmp_path.glob("*.fab")
    assert bundle.stat().st_size < 50_000
    with zipfile.ZipFile(bundle) as held:
        names = {name for name in held.namelist() if not name.startswith(".info")}
        assert names == {"pyproject.toml", "fdapp/__init__.py", "fdapp/apps.py"}
        for name in held.namelist():
            assert b"PRIVATE KEY" not in held.read(name)


# What is refused


def test_a_folder_that_is_not_empty_is_left_as_it_is(tmp_path):
    (tmp_path / "kit").mkdir()
    write_kit(tmp_path / "kit", make_kit())  # empty is fine
    before = {path: path.read_bytes() for path in all_files(tmp_path)}
    with pytest.raises(RunError, match="found a folder that is not empty"):
        write_kit(tmp_path / "kit", make_kit())
    assert before == {path: path.read_bytes() for path in all_files(tmp_path)}
    (tmp_path / "file").write_text("mine")
    with pytest.raises(RunError, match="found a file"):
        write_kit(tmp_path / "file", make_kit())
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("exists", [True, False])
def test_half_a_kit_is_taken_away(tmp_path, monkeypatch, exists):
    from fedistill.flower import kit as module

    folder = tmp_path / "kit"
    if exists:
        folder.mkdir()
    write = module._write

    def full(where, path, item):
        if path == f"sites/{SITES[1]}/site.toml":
            raise OSError(28, "No space left on device")
        write(where, path, item)

    monkeypatch.setattr(module, "_write", full)
    with pytest.raises(RunError, match="found No space left on device: make room"):
        write_kit(folder, make_kit())
    assert all_files(tmp_path) == []
    assert folder.exists() == exists


BAD = {
    "no site": ({"sites": (), "site_settings": {}, "own": {}}, "expected at least one site"),
    "path": ({"sites": ("../x",)}, "a client id must be"),
    "shell": ({"sites": ("a;b",)}, "a client id must be"),
    "capitals": ({"sites": ("a", "A")}, "differ in more than capitals"),
    "host": ({"host": "a b"}, "expected the DNS name or the IP address"),
    "host with port": ({"host": "a.example:80"}, "without a port"),
    "option": ({"host": "-v"}, "expected the DNS name or the IP address"),
    "scope": ({"host": "fe80::1%eth0"}, "expected the DNS name or the IP address"),
    "port": ({"port": 70000}, "expected a TCP port"),
    "one port": ({"port": 9091}, "found 9091 twice"),
    "no settings": ({"site_settings": {}}, "expected settings for the sites"),
    "stranger": ({"own": {"else": {"rows.npz": b""}}}, "found files of else"),
    "climbing": ({"public": {"../x.npz": b""}}, "expected a plain file name"),
    "taken": ({"public": {"ca.crt": b""}}, "found 'ca.crt' twice"),
    "taken, in capitals": ({"coordinator": {"SERVER.key": b""}}, "found 'SERVER.key' twice"),
    "twice": ({"public": {"rows.npz": b""}}, "found 'rows.npz' twice"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_kit_that_contradicts_itself_is_refused_before_anything_is_written(name, tmp_path):
    changes, sentence = BAD[name]
    with pytest.raises(RunError, match=sentence):
        write_kit(tmp_path / "kit", make_kit(**changes))
    assert not (tmp_path / "kit").exists()


# For real: SuperLink, SuperNode and nginx on the loopback


def free_ports(count):
    with contextlib.ExitStack() as held:
        sockets = [held.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


class Deployment:
    """The processes of one kit, each of which is ended by its own pid."""

    def __init__(self, folder):
        self.folder = folder
        self.public, self.inner, *self.nodes = free_ports(4)
        write_kit(
            folder / "kit",
            make_kit(
                sites=("a", "b"),
                host="127.0.0.1",
                port=self.public,
                inner=self.inner,
                site_settings={"a": "", "b": ""},
                own={},
            ),
        )
        self.started = []

    def start(self, script, **environment):
        log = self.folder / f"{len(self.started)}.log"
        with log.open("wb") as told:
            process = subprocess.Popen(
                [self.folder / "kit" / script],
                env=os.environ | {"FEDISTILL_VENV": str(BIN.parent)} | environment,
                stdout=told,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self.started.append(process)
        return process, log

    def site(self, name, **environment):
        port = self.nodes["ab".index(name)]
        return self.start(f"sites/{name}/start.sh", FEDISTILL_NODE_PORT=str(port), **environment)

    def register(self):
        return subprocess.run(
            [self.folder / "kit" / "coordinator" / "register-sites.sh"],
            env=os.environ | {"FEDISTILL_VENV": str(BIN.parent)},
            capture_output=True,
            text=True,
            timeout=120,
        )

    def flwr(self, *arguments, port=None):
        """The command line of the coordinator, as it stands or against another port."""
        home = self.folder / "kit" / "coordinator" / "flower"
        if port is not None:
            text = (home / "config.toml").read_text()
            home = self.folder / "elsewhere"
            home.mkdir(exist_ok=True)
            (home / "config.toml").write_text(text.replace(f":{self.inner}", f":{port}"))
        return subprocess.run(
            [BIN / "flwr", *arguments],
            env=os.environ | OFF | {"FLWR_HOME": str(home)},
            capture_output=True,
            text=True,
            timeout=60,
        )

    def states(self):
        listed = self.flwr("supernode", "list", "superlink", "--format", "json")
        return sorted(node["status"] for node in json.loads(listed.stdout)["nodes"])

    def stop(self):
        for process in reversed(self.started):
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
        for process in self.started:
            try:
                process.wait(timeout=20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


@pytest.fixture
def deployment(tmp_path):
    made = Deployment(tmp_path)
    yield made
    made.stop()


def until(true, seconds, process=None):
    """Wait for something, but not for a process that has ended."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if true():
            return True
        if process is not None and process.poll() is not None:
            return true()
        time.sleep(0.3)
    return False


@pytest.mark.slow
def test_the_scripts_bring_up_a_federation_and_refuse_a_stranger(deployment):
    deployment.start("coordinator/start-superlink.sh")
    keep = deployment.folder / "kit" / "coordinator" / "sites"
    (keep / "b.pub").rename(deployment.folder / "b.pub")  # b is not registered yet
    first = deployment.register()
    assert first.returncode == 0, first.stderr
    again = deployment.register()
    assert again.returncode == 0
    assert again.stdout == "a: key already known (registered, or removed earlier)\n"
    lines = (keep.parent / "state" / "nodes").read_text().splitlines()
    assert [line.split()[0] for line in lines] == ["a"]
    assert re.fullmatch(r"a \d+", lines[0])

    direct = {"FEDISTILL_SUPERLINK": f"127.0.0.1:{deployment.inner}"}
    site, log = deployment.site("a", **direct)
    assert until(lambda: "SuperNode ID" in log.read_text(), 60, site), log.read_text()
    assert deployment.states() == ["online"]
    stranger, log = deployment.site("b", **direct)
    assert stranger.wait(timeout=60) == 1
    assert "[code: 2004] Failed to activate SuperNode" in log.read_text()
    assert deployment.states() == ["online"]

    site.send_signal(signal.SIGTERM)
    assert site.wait(timeout=30) == 0  # hence Restart=always
    assert until(lambda: deployment.states() == ["offline"], 10)


@pytest.mark.slow
def test_a_site_refuses_a_coordinator_of_another_authority(deployment, tmp_path):
    deployment.start("coordinator/start-superlink.sh")
    assert deployment.register().returncode == 0
    _, other = keys.authority("fedistill federation")
    site = deployment.folder / "kit" / "sites" / "a"
    (site / "ca.crt").write_bytes(keys.certificate_pem(other))
    process, log = deployment.site("a", FEDISTILL_SUPERLINK=f"127.0.0.1:{deployment.inner}")
    assert process.wait(timeout=60) == 1
    assert "CERTIFICATE_VERIFY_FAILED" in log.read_text()
    assert deployment.states() == ["registered", "registered"]


@needs_nginx
def test_nginx_reads_its_settings(deployment):
    coordinator = deployment.folder / "kit" / "coordinator"
    done = subprocess.run(
        [coordinator / "start-nginx.sh", "-t"], capture_output=True, text=True, timeout=30
    )
    assert done.returncode == 0, done.stderr
    assert "test is successful" in done.stderr
    assert not {"warn", "emerg"} & set(re.findall(r"\[(\w+)\]", done.stderr)), done.stderr


def test_nginx_passes_what_a_registered_site_asks_and_no_more():
    """A new flwr that asks for more is noticed here, not in a hospital."""
    import inspect

    from flwr.supernode import fleet_http_client

    asked = set(re.findall(r'"/v1/fleet/([^"]+)"', inspect.getsource(fleet_http_client)))
    assert asked - set(FLEET) == {"register-node", "unregister-node"}
    assert set(FLEET) <= asked


HIDDEN = [
    "/v1/control/list-nodes",
    "/v1/control/start-run",
    "/v1/runtime/acquire-task",
    "/v1/fleet/register-node",
    "/v1/fleet/../control/list-nodes",
    "/v1/fleet/%2e%2e/control/list-nodes",
    "/v1/fleet/..%2fcontrol%2flist-nodes",
    "/v1/fleet/pull-messages/../../control/list-nodes",
    "/v1/fleet/pull-messages;/../../control/list-nodes",
    "/v1/fleet/pull-messages%00/v1/control/list-nodes",
    "//v1/control/list-nodes",
    "/health/../v1/control/list-nodes",
    "/V1/CONTROL/list-nodes",
    "/v1/fleet/",
    "/docs",
    "/openapi.json",
    "/v1/responses",
]


@needs_nginx
@pytest.mark.slow
def test_through_nginx_a_site_works_and_nobody_can_start_code(deployment):
    deployment.start("coordinator/start-superlink.sh")
    nginx, nginx_log = deployment.start("coordinator/start-nginx.sh")
    assert deployment.register().returncode == 0
    site, log = deployment.site("a")  # by its own settings: the port of nginx
    assert until(lambda: "SuperNode ID" in log.read_text(), 60, site), log.read_text()
    assert deployment.states() == ["online", "registered"]

    app = str(deployment.folder / "kit" / "coordinator" / "app")
    for command in (
        ["supernode", "list", "superlink"],
        ["list", "superlink"],
        ["run", app, "superlink"],
        ["supernode", "unregister", "1", "superlink"],
    ):
        refused = deployment.flwr(*command, port=deployment.public)
        assert refused.returncode != 0, command
        assert "403 Forbidden" in refused.stdout + refused.stderr, command

    trust = ssl.create_default_context(cafile=deployment.folder / "kit/coordinator/ca.crt")
    trust.verify_flags |= ssl.VERIFY_X509_STRICT

    def ask(method, path):
        connection = http.client.HTTPSConnection(
            "127.0.0.1", deployment.public, context=trust, timeout=10
        )
        connection.putrequest(method, path)  # as it stands: no path is tidied here
        connection.putheader("Content-Type", "application/x-protobuf")
        connection.putheader("Content-Length", "0")
        connection.endheaders()
        with contextlib.closing(connection):
            return connection.getresponse().status

    ours = deployment.folder / "kit" / "coordinator" / "logs" / "superlink.log"
    before = len(ours.read_bytes())
    for path in HIDDEN:
        for method in ("GET", "POST"):
            assert ask(method, path) in (400, 403), (method, path)
    assert "/v1/control" not in ours.read_bytes()[before:].decode()
    assert ask("GET", "/health") == 200
    assert ask("POST", "/health") == 403
    assert ask("GET", "/v1/fleet/pull-messages") == 403
    # A stranger reaches the Fleet API and is turned away by it, for want of a key.
    assert ask("POST", "/v1/fleet/pull-messages") in (401, 415)

    # A plain-text client gets no further than the greeting.
    plain = http.client.HTTPConnection("127.0.0.1", deployment.public, timeout=10)
    with contextlib.closing(plain):
        plain.request("GET", "/health")
        assert plain.getresponse().status == 400

    # It still works, and asks again every three seconds without a failure.
    time.sleep(7)
    assert site.poll() is None
    assert "retrying" not in log.read_text()
    assert deployment.states() == ["online", "registered"]
    assert "upstream" not in nginx_log.read_text()  # the SuperLink answered every time
    nginx.send_signal(signal.SIGTERM)
    assert nginx.wait(timeout=20) == 0
