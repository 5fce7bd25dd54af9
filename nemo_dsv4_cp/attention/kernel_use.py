# SPDX-License-Identifier: Apache-2.0
"""What attention layers of V4 and V4.1 have in common: a kernel backend, by the model's options."""

from __future__ import annotations

from typing import Any

from nemo_dsv4_cp import plugins
from nemo_dsv4_cp.automodel.tilelang import kernels_until_chosen
from nemo_dsv4_cp.kernels.protocol import Kernels
from nemo_dsv4_cp.options import AUTO, ContextParallelOptions


class UsesKernels:
    """An attention of AutoModel's that computes with a backend of this package."""

    def _take_options(self: Any, options: ContextParallelOptions) -> None:
        """Take over the model's options, and the kernels that they name.

        Raises:
            ValueError: If the layer has dropout, or the kernels cannot run here.
        """
        if self.attention_dropout:
            raise ValueError(
                f"attention_dropout={self.attention_dropout} is not supported with context "
                "parallelism; set attention_dropout: 0.0"
            )
        self._options = options
        named = options.kernels
        self.use_kernels(kernels_until_chosen(self.backend) if named == AUTO else named)

    def use_kernels(self: Any, name: str) -> None:
        """Compute with another backend from now on.

        Raises:
            ValueError: If it cannot run here.
        """
        self.kernels_name = name
        self._kernels: Kernels = plugins.load(plugins.KERNELS, name)(
            workspace_bytes=self._options.workspace_bytes
        )
