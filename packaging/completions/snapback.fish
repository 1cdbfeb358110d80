COMPLETE=fish /usr/bin/snapback | source
