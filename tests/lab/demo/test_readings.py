"""What the demos read from a run: a picture whose receipt says less than all sites is refused."""

import json

import pytest
from PIL import Image

from linearize.lab.demo.distill_chain import LAKE
from linearize.lab.demo.readings import measures_of, receipt_of
from linearize.lab.server import ServerProblem


def picture(sites="double.0, single.0-3", kind="linear", share=1.0):
    """Return a picture with a receipt of one kind at some sites."""
    plan = {"format": "linearize/plan/1", "host": "flux", "sites": {sites: {"kind": kind}}}
    found = Image.new("RGB", (4, 4))
    found.info["linearize"] = json.dumps([{"plan": plan, "share_linearized": share, "share_of_pairs": 0.5}])
    return found


def test_a_receipt_of_all_sites_is_returned():
    assert receipt_of(picture(), "linear", LAKE.sites)["share_of_pairs"] == 0.5


@pytest.mark.parametrize("found", [
    picture(sites="single.0-3"), picture(kind="dense"), picture(share=0.8), Image.new("RGB", (4, 4)),
])  # fmt: skip
def test_less_than_all_sites_is_a_sentence(found):
    with pytest.raises(ServerProblem, match="not every attention site ran on linear; the picture's receipt says"):
        receipt_of(found, "linear", LAKE.sites)


def test_measures_are_read_from_the_text_of_the_node():
    text = "512 x 512, 1 frame\nPSNR 24.41 dB\nSSIM 0.9012\nlargest difference 0.5 of 1"
    assert measures_of({"LinearizeCompare": {"text": [text]}}) == (24.41, 0.9012)
    with pytest.raises(ServerProblem, match="gave no measures"):
        measures_of({"LinearizeCompare": {"text": ["PSNR 24.41 dB"]}})
