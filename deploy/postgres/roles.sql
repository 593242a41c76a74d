-- One role and one schema for each service that keeps state, and the database they share.
-- Safe to repeat. Run by psql as a superuser, here and on a PostgreSQL of your own:
--
--   MAAS_DATABASE=maas CATALOG_PASSWORD=... AUTH_PASSWORD=... \
--   BILLING_PASSWORD=... SCHEDULER_PASSWORD=... psql --file deploy/postgres/roles.sql
--
-- Passwords come from the environment, for a command line is public. Every service reaches its
-- own schema and nothing else; tables are made by its migrations.
\set QUIET on
\set ON_ERROR_STOP on
\getenv database MAAS_DATABASE
\getenv catalog_password CATALOG_PASSWORD
\getenv auth_password AUTH_PASSWORD
\getenv billing_password BILLING_PASSWORD
\getenv scheduler_password SCHEDULER_PASSWORD

SELECT format('CREATE ROLE %I', wanted.name)
  FROM unnest(ARRAY['catalog', 'auth', 'billing', 'scheduler']) AS wanted (name)
 WHERE NOT EXISTS (SELECT FROM pg_roles WHERE rolname = wanted.name)
\gexec

ALTER ROLE catalog WITH LOGIN PASSWORD :'catalog_password';
ALTER ROLE auth WITH LOGIN PASSWORD :'auth_password';
ALTER ROLE billing WITH LOGIN PASSWORD :'billing_password';
ALTER ROLE scheduler WITH LOGIN PASSWORD :'scheduler_password';
ALTER ROLE catalog SET search_path = catalog;
ALTER ROLE auth SET search_path = auth;
ALTER ROLE billing SET search_path = billing;
ALTER ROLE scheduler SET search_path = scheduler;

SELECT format('CREATE DATABASE %I TEMPLATE template0 ENCODING ''UTF8''', :'database')
 WHERE NOT EXISTS (SELECT FROM pg_database WHERE datname = :'database')
\gexec

REVOKE ALL ON DATABASE :"database" FROM PUBLIC;
-- CREATE because migrations begin with CREATE SCHEMA IF NOT EXISTS, which asks for it either way.
GRANT CONNECT, CREATE ON DATABASE :"database" TO catalog, auth, billing, scheduler;
\connect :"database"
SET client_min_messages = warning;
REVOKE ALL ON SCHEMA public FROM PUBLIC;
CREATE SCHEMA IF NOT EXISTS catalog AUTHORIZATION catalog;
CREATE SCHEMA IF NOT EXISTS auth AUTHORIZATION auth;
CREATE SCHEMA IF NOT EXISTS billing AUTHORIZATION billing;
CREATE SCHEMA IF NOT EXISTS scheduler AUTHORIZATION scheduler;
