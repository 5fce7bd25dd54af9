"""All that this package knows of AutoModel's releases and their private places."""

from nemo_dsv4_cp.host.cp_utils import make_cp_batch_and_ctx

__all__ = ["make_cp_batch_and_ctx"]
