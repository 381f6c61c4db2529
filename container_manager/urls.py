from django.contrib import admin
from django.contrib.staticfiles.views import serve
from django.urls import path
from django.views.generic import RedirectView

admin.autodiscover()

urlpatterns = [
    path("", RedirectView.as_view(pattern_name="admin:index")),
    path("admin/", admin.site.urls),
    # The admin's own style, so that the site needs no other server in front of it: a first look has none. With
    # `insecure` Django means slow.
    path("static/<path:path>", serve, {"insecure": True}),
]
