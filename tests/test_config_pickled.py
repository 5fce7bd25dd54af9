# SPDX-License-Identifier: Apache-2.0
import pickle
import subprocess
import sys

from tests.parity import tiny_config

CODE = """
import pickle, sys
pickle.load(open(sys.argv[1], "rb"))
from nemo_dsv4_cp.automodel import patches
sys.exit(not patches.replaced_names())
"""


def test_a_config_that_is_unpickled_patches_automodel_as_one_that_is_made(tmp_path):
    file = tmp_path / "config.pkl"
    file.write_bytes(pickle.dumps(tiny_config([0, 4])))
    subprocess.run([sys.executable, "-c", CODE, str(file)], check=True)
