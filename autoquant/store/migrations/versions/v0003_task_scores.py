"""What models scored on tasks.

Revision ID: 0003
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"

COUNT = sa.BigInteger().with_variant(sa.Integer(), "sqlite")  # whose integers have 64 bits


def upgrade() -> None:
    op.create_table('task_score',
    sa.Column('id', sa.Integer(), nullable=False),
    sa.Column('subject', sa.String(), nullable=False),
    sa.Column('dtype', sa.String(), nullable=False),
    sa.Column('task', sa.String(), nullable=False),
    sa.Column('metric', sa.String(), nullable=False),
    sa.Column('samples_limit', COUNT, nullable=False),
    sa.Column('lm_eval_version', sa.String(), nullable=False),
    sa.Column('value', sa.Double(), nullable=False),
    sa.Column('stderr', sa.Double(), nullable=True),
    sa.Column('samples', COUNT, nullable=True),
    sa.Column('created', sa.DateTime(), nullable=False),
    sa.PrimaryKeyConstraint('id', name=op.f('pk_task_score')),
    sa.UniqueConstraint('subject', 'dtype', 'task', 'metric', 'samples_limit', 'lm_eval_version', name=op.f('uq_task_score_subject_dtype_task_metric_samples_limit_lm_eval_version'))
    )
