# A Nomad system job: the snapback daemon with a pool on every node that has images. It serves the
# node's pools to whoever may use its socket there; which job gets to which node is Nomad's business.
#
# A node says by `meta { snapback = "true" }` that it has snapback and QEMU installed and images in
# /srv/images. The driver `raw_exec` has to be enabled: QEMU needs userfaultfd, and the daemon the
# right to trace it, so it runs as the Nomad client does, as root. Jobs on that node take guests by
# /run/snapback/daemon.sock: those of `raw_exec` as it is, those of `docker` with /run/snapback and
# /var/lib/snapback mounted at the same paths, since a guest's sockets are told by their paths.
#
# Tried: it can be parsed as HCL 2 (python-hcl2), and the daemon starts with such a configuration.
# Not tried: a Nomad.

job "snapback" {
  type = "system"

  constraint {
    attribute = "${meta.snapback}"
    value     = "true"
  }

  group "node" {
    task "daemon" {
      driver = "raw_exec"

      config {
        command = "/usr/bin/snapback"
        args    = ["daemon", "--config", "local/daemon.toml"]
      }

      template {
        destination = "local/daemon.toml"
        # A daemon that is started anew ends the guests of the one before: nobody's jobs are ended
        # by a change of this text alone.
        change_mode = "noop"
        data        = <<-TOML
          arming = 2

          [pools.booted]
          image = "/srv/images/booted.snap"
          armed = 4
          max = 16
          lifetime_s = 7200
        TOML
      }

      kill_timeout = "30s"

      # The guests count here as well: they are its children.
      resources {
        cpu    = 4000
        memory = 16384
      }
    }
  }
}
