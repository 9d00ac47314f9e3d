"""What README tells of the hosts' tests is what the families have."""

import json
from pathlib import Path

from families import collect

from linearize.attention.hosts import HOSTS

ROOT = Path(__file__).resolve().parents[3]


def told(families):
    """Return what the table tells of a host's families."""
    cases = [(name, case) for family in families for name, case in family.cases.items()]
    return {
        "sites": list(dict.fromkeys(site.rpartition(".")[0] for family in families for site in family.sites)),
        "cases": len(cases),
        "models": len(families),
        "sequence": list(dict.fromkeys(role for _, case in cases for role, _, _ in case.segments)),
        "dense": list(dict.fromkeys(name for name, case in cases if case.declines)),
    }


def test_readme_tells_today_s_families():
    """`python -m lab.benchmarks.tables --hosts` takes over what this writes."""
    families = collect()
    found = {host.name: told([family for family in families if family.host == host.name]) for host in HOSTS}
    (ROOT / ".comfyui" / "hosts.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    stored = json.loads((ROOT / "docs" / "hosts.json").read_text(encoding="utf-8"))
    assert stored == found, "run: python -m lab.benchmarks.tables --hosts"
