"""Plans as their users run them.

Revision ID: 0004
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"

RECORD = sa.JSON().with_variant(sa.Text(), "postgresql")


def upgrade() -> None:
    op.create_table('delivery',
    sa.Column('plan_id', sa.String(), nullable=False),
    sa.Column('delivery', RECORD, nullable=False),
    sa.Column('created', sa.DateTime(), nullable=False),
    sa.ForeignKeyConstraint(['plan_id'], ['plan.id'], name=op.f('fk_delivery_plan_id')),
    sa.PrimaryKeyConstraint('plan_id', name=op.f('pk_delivery'))
    )
