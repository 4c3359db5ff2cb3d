"""What a device can do at most.

Revision ID: 0002
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"

RECORD = sa.JSON().with_variant(sa.Text(), "postgresql")


def upgrade() -> None:
    op.create_table('roofline',
    sa.Column('device_key', sa.String(), nullable=False),
    sa.Column('bandwidth_bytes_per_s', sa.Double(), nullable=False),
    sa.Column('flops_per_s', RECORD, nullable=False),
    sa.Column('created', sa.DateTime(), nullable=False),
    sa.ForeignKeyConstraint(['device_key'], ['device.key'], name=op.f('fk_roofline_device_key')),
    sa.PrimaryKeyConstraint('device_key', name=op.f('pk_roofline'))
    )
