"""The first schema.

Revision ID: 0001
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None

RECORD = sa.JSON().with_variant(sa.Text(), "postgresql")
COUNT = sa.BigInteger().with_variant(sa.Integer(), "sqlite")  # whose integers have 64 bits


def upgrade() -> None:
    op.create_table('device',
    sa.Column('key', sa.String(), nullable=False),
    sa.Column('fingerprint', RECORD, nullable=False),
    sa.Column('created', sa.DateTime(), nullable=False),
    sa.PrimaryKeyConstraint('key', name=op.f('pk_device'))
    )
    op.create_table('model',
    sa.Column('hash', sa.String(), nullable=False),
    sa.Column('source', RECORD, nullable=False),
    sa.Column('created', sa.DateTime(), nullable=False),
    sa.PrimaryKeyConstraint('hash', name=op.f('pk_model'))
    )
    op.create_table('loss',
    sa.Column('id', sa.Integer(), nullable=False),
    sa.Column('model_hash', sa.String(), nullable=False),
    sa.Column('quality_key', sa.String(), nullable=False),
    sa.Column('method', sa.String(), nullable=False),
    sa.Column('layer', sa.String(), nullable=False),
    sa.Column('numerics', sa.String(), nullable=False),
    sa.Column('loss', sa.Double(), nullable=False),
    sa.Column('created', sa.DateTime(), nullable=False),
    sa.ForeignKeyConstraint(['model_hash'], ['model.hash'], name=op.f('fk_loss_model_hash')),
    sa.PrimaryKeyConstraint('id', name=op.f('pk_loss')),
    sa.UniqueConstraint('model_hash', 'quality_key', 'method', 'layer', 'numerics', name=op.f('uq_loss_model_hash_quality_key_method_layer_numerics'))
    )
    op.create_table('study',
    sa.Column('id', sa.String(), nullable=False),
    sa.Column('model_hash', sa.String(), nullable=False),
    sa.Column('device_key', sa.String(), nullable=False),
    sa.Column('identity', RECORD, nullable=False),
    sa.Column('workload', RECORD, nullable=False),
    sa.Column('limits', RECORD, nullable=False),
    sa.Column('recording', RECORD, nullable=True),
    sa.Column('problem', RECORD, nullable=True),
    sa.Column('recommended', sa.String(), nullable=True),
    sa.Column('complete', sa.Boolean(), nullable=False),
    sa.Column('spent_s', sa.Double(), nullable=False),
    sa.Column('created', sa.DateTime(), nullable=False),
    sa.Column('updated', sa.DateTime(), nullable=False),
    sa.ForeignKeyConstraint(['device_key'], ['device.key'], name=op.f('fk_study_device_key')),
    sa.ForeignKeyConstraint(['model_hash'], ['model.hash'], name=op.f('fk_study_model_hash')),
    sa.PrimaryKeyConstraint('id', name=op.f('pk_study'))
    )
    op.create_table('timing',
    sa.Column('id', sa.Integer(), nullable=False),
    sa.Column('device_key', sa.String(), nullable=False),
    sa.Column('protocol', sa.String(), nullable=False),
    sa.Column('n', COUNT, nullable=False),
    sa.Column('k', COUNT, nullable=False),
    sa.Column('bias', sa.Boolean(), nullable=False),
    sa.Column('dtype', sa.String(), nullable=False),
    sa.Column('m', COUNT, nullable=False),
    sa.Column('format', sa.String(), nullable=False),
    sa.Column('kernel', sa.String(), nullable=False),
    sa.Column('working_set_bytes', COUNT, nullable=False),
    sa.Column('outcome', sa.String(), nullable=False),
    sa.Column('reason', sa.String(), nullable=False),
    sa.Column('latency_us', sa.Double(), nullable=True),
    sa.Column('samples_us', RECORD, nullable=False),
    sa.Column('relative_error', sa.Double(), nullable=True),
    sa.Column('created', sa.DateTime(), nullable=False),
    sa.ForeignKeyConstraint(['device_key'], ['device.key'], name=op.f('fk_timing_device_key')),
    sa.PrimaryKeyConstraint('id', name=op.f('pk_timing')),
    sa.UniqueConstraint('device_key', 'protocol', 'n', 'k', 'bias', 'dtype', 'm', 'format', 'kernel', 'working_set_bytes', name=op.f('uq_timing_device_key_protocol_n_k_bias_dtype_m_format_kernel_working_set_bytes'))
    )
    op.create_table('plan',
    sa.Column('id', sa.String(), nullable=False),
    sa.Column('study_id', sa.String(), nullable=False),
    sa.Column('label', sa.String(), nullable=False),
    sa.Column('kind', sa.String(), nullable=False),
    sa.Column('model_hash', sa.String(), nullable=False),
    sa.Column('dtype', sa.String(), nullable=False),
    sa.Column('layers', RECORD, nullable=False),
    sa.Column('prediction', RECORD, nullable=False),
    sa.Column('created', sa.DateTime(), nullable=False),
    sa.ForeignKeyConstraint(['study_id'], ['study.id'], name=op.f('fk_plan_study_id')),
    sa.PrimaryKeyConstraint('id', name=op.f('pk_plan'))
    )
    op.create_index(op.f('ix_plan_study_id'), 'plan', ['study_id'], unique=False)
    op.create_table('reference',
    sa.Column('id', sa.Integer(), nullable=False),
    sa.Column('study_id', sa.String(), nullable=False),
    sa.Column('name', sa.String(), nullable=False),
    sa.Column('value', RECORD, nullable=False),
    sa.Column('created', sa.DateTime(), nullable=False),
    sa.ForeignKeyConstraint(['study_id'], ['study.id'], name=op.f('fk_reference_study_id')),
    sa.PrimaryKeyConstraint('id', name=op.f('pk_reference')),
    sa.UniqueConstraint('study_id', 'name', name=op.f('uq_reference_study_id_name'))
    )
    op.create_table('proof',
    sa.Column('plan_id', sa.String(), nullable=False),
    sa.Column('outcome', sa.String(), nullable=False),
    sa.Column('reason', sa.String(), nullable=False),
    sa.Column('proof', RECORD, nullable=True),
    sa.Column('created', sa.DateTime(), nullable=False),
    sa.ForeignKeyConstraint(['plan_id'], ['plan.id'], name=op.f('fk_proof_plan_id')),
    sa.PrimaryKeyConstraint('plan_id', name=op.f('pk_proof'))
    )
