# SPDX-License-Identifier: Apache-2.0
"""What AutoModel 0.5 and 0.6 need alone."""
