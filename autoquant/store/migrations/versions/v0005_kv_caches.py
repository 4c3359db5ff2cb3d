"""How plans keep keys and values.

Revision ID: 0005
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"


def upgrade() -> None:
    op.add_column('plan', sa.Column('kv_cache', sa.String(), nullable=True))
