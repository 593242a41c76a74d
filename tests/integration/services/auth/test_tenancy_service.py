"""services/auth: organizations and projects, from the wire to PostgreSQL."""

from __future__ import annotations

import pytest
from maas.auth.v1 import tenancy_pb2
from maas.auth.v1 import tenancy_service_pb2 as pb

from libs.errors import AlreadyExists, FieldRule, InvalidArgument, NotFound, Reason
from libs.testing.clock import START
from tests.integration.services.auth.harness import Auth


async def get_organization(auth: Auth, name: str) -> tenancy_pb2.Organization:
    request = pb.GetOrganizationRequest(name=name)
    return (await auth.admin.call(auth.tenancy.GetOrganization, request)).organization


async def get_project(auth: Auth, name: str) -> tenancy_pb2.Project:
    request = pb.GetProjectRequest(name=name)
    return (await auth.admin.call(auth.tenancy.GetProject, request)).project


async def list_projects(
    auth: Auth, organization: str = "", page_token: str = ""
) -> tuple[list[str], str]:
    request = pb.ListProjectsRequest(page_size=2, organization=organization, page_token=page_token)
    page = await auth.admin.call(auth.tenancy.ListProjects, request)
    return [item.name for item in page.projects], page.next_page_token


async def test_created_organization_is_read_back(auth: Auth) -> None:
    made = await auth.create_organization("acme", "Acme, Inc.")

    want = tenancy_pb2.Organization(name="organizations/acme", display_name="Acme, Inc.")
    want.create_time.FromDatetime(START)
    assert made == want
    assert await get_organization(auth, "organizations/acme") == want


async def test_creating_an_equal_organization_again_returns_the_first(auth: Auth) -> None:
    first = await auth.create_organization("acme", "Acme")
    auth.clock.advance(5)

    assert await auth.create_organization("acme", "Acme") == first


async def test_creating_another_organization_of_the_same_name_is_refused(auth: Auth) -> None:
    await auth.create_organization("acme", "Acme")

    with pytest.raises(AlreadyExists) as caught:
        await auth.create_organization("acme", "Other")

    assert caught.value.metadata == {"resource": "organizations/acme"}


async def test_organizations_are_listed_by_name(auth: Auth) -> None:
    for organization_id in ("cc", "aa", "bb"):
        await auth.create_organization(organization_id)

    names: list[str] = []
    token = ""
    for _ in range(2):
        request = pb.ListOrganizationsRequest(page_size=2, page_token=token)
        page = await auth.admin.call(auth.tenancy.ListOrganizations, request)
        names += [item.name for item in page.organizations]
        token = page.next_page_token

    assert names == ["organizations/aa", "organizations/bb", "organizations/cc"]
    assert token == ""


async def test_created_project_is_read_back(auth: Auth) -> None:
    await auth.create_organization("acme")

    made = await auth.create_project("demo", "organizations/acme", "Demo")

    want = tenancy_pb2.Project(
        name="projects/demo", organization="organizations/acme", display_name="Demo"
    )
    want.create_time.FromDatetime(START)
    assert made == want
    assert await get_project(auth, "projects/demo") == want


async def test_creating_an_equal_project_again_returns_the_first(auth: Auth) -> None:
    await auth.create_organization("acme")
    first = await auth.create_project("demo", "organizations/acme")
    auth.clock.advance(5)

    assert await auth.create_project("demo", "organizations/acme") == first


async def test_project_cannot_be_taken_over(auth: Auth) -> None:
    await auth.create_organization("acme")
    await auth.create_organization("evil")
    first = await auth.create_project("demo", "organizations/acme")

    with pytest.raises(AlreadyExists):
        await auth.create_project("demo", "organizations/evil")

    assert await get_project(auth, "projects/demo") == first


async def test_project_of_an_unknown_organization_is_refused(auth: Auth) -> None:
    with pytest.raises(NotFound) as caught:
        await auth.create_project("demo", "organizations/none")

    assert caught.value.metadata == {"resource": "organizations/none"}


async def test_projects_are_listed_of_one_organization_or_of_all(auth: Auth) -> None:
    for organization in ("aa", "bb"):
        await auth.create_organization(organization)
        for number in range(2):
            await auth.create_project(f"{organization}-{number}", f"organizations/{organization}")

    first, token = await list_projects(auth)
    rest, last = await list_projects(auth, page_token=token)
    assert first + rest == ["projects/aa-0", "projects/aa-1", "projects/bb-0", "projects/bb-1"]
    assert last == ""
    assert await list_projects(auth, "organizations/bb") == (
        ["projects/bb-0", "projects/bb-1"],
        "",
    )
    assert await list_projects(auth, "organizations/none") == ([], "")


async def test_unknown_names_are_not_found(auth: Auth) -> None:
    with pytest.raises(NotFound):
        await get_organization(auth, "organizations/none")
    with pytest.raises(NotFound):
        await get_project(auth, "projects/none")


async def test_bad_names_are_refused(auth: Auth) -> None:
    for call in (
        get_organization(auth, "projects/a"),
        get_project(auth, "organizations/a"),
        auth.create_project("demo", "acme"),
        list_projects(auth, "acme"),
    ):
        with pytest.raises(InvalidArgument) as caught:
            await call
        assert caught.value.violations[0].rule is FieldRule.BAD_FORMAT


async def test_bad_ids_are_refused(auth: Auth) -> None:
    for bad in ("", "A", "a", "1a", "a-", "a_b", "a" * 64):
        with pytest.raises(InvalidArgument) as caught:
            await auth.create_organization(bad)
        assert caught.value.metadata == {"field": "organization_id"}, bad


async def test_invented_page_token_is_refused(auth: Auth) -> None:
    with pytest.raises(InvalidArgument) as caught:
        await list_projects(auth, page_token="%")

    assert caught.value.reason is Reason.BAD_PAGE_TOKEN
