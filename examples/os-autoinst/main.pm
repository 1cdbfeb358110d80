# What this distribution runs. A real one has its own, and adds the two lines of `milestones`.
use Mojo::Base -strict;
use testapi;
use autotest;

use lib get_required_var('CASEDIR') . '/lib';
require milestones if get_var('SNAPBACK_MILESTONES');

autotest::loadtest("tests/$_.pm") for qw(boot breaks breaks_again works);
1;
