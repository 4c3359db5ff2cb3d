"""Runs migrations on the connection that `autoquant.store.connect` hands over."""

from alembic import context

from autoquant.store.connect import VERSION_TABLE
from autoquant.store.schema import Base

connection = context.config.attributes["connection"]
# Optuna keeps its own `alembic_version` in the same database, hence a version table of our own.
context.configure(
    connection=connection,
    target_metadata=Base.metadata,
    version_table=VERSION_TABLE,
    transactional_ddl=True,
)
with context.begin_transaction():
    context.run_migrations()
